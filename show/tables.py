"""Results as plain text."""


def table(results: dict) -> str:
    """The results as plain text: methods, then what the reward is worth at inference."""
    lines = [f"{'share of test questions right':37s}{'temperature 1':>22s}{'greedy':>22s}{'seconds':>9s}"]
    names = {"base": "base", "sft": "SFT", "sft_fair": "SFT, averaged and sharpened as IRL", "irl": "IRL (no verifier)",
             "likelihood": "IRL without its discriminator", "grpo": "GRPO (true answer)"}  # fmt: skip
    for method, r in results["methods"].items():
        cells = [f"{r[k]:.3f} [{r[k + '_interval'][0]:.3f}, {r[k + '_interval'][1]:.3f}]" for k in ("t1", "greedy")]
        lines.append(f"{names[method]:37s}{cells[0]:>22s}{cells[1]:>22s}{r.get('seconds', 0):9.0f}")
    for n in (key for key in ("4", "16") if key in results["rerank"]):
        row = results["rerank"][n]
        logprobs = (rule for rule in row if rule.endswith("logprob"))
        rules = ("random", "longest", "shortest", "majority", *logprobs, "reward", "oracle")
        found = ", ".join(f"{rule} {row[rule][0]:.3f}" for rule in rules if rule in row)
        lines.append(f"{'best of ' + n + ' samples of the base':37s}{found}")
    if results["reward"].get("auroc") is not None:  # None where all samples were right, or all wrong
        lines.append(f"{'AUROC, right against wrong':37s}reward {results['reward']['auroc']:.3f}")
    for kind in ("wrong", "right"):
        rates = {name: found[kind] for name, found in results.get("alarms", {}).items() if found[kind] is not None}
        shown = ", ".join(f"{name} {rate:.3f}" for name, rate in rates.items())
        lines += [f"{f'{kind} traces with a token below -1':37s}{shown}"] if shown else []
    for kind, name in (("natural", "its own errors"), ("single", "one planted error")):
        hits = results["localise"].get(kind, {}).get("hit0", {})
        found = ", ".join(
            f"{key} {value[0]:.3f}"
            for key, value in hits.items()
            if key.endswith("_first") or (key == "reward" and "reward_first" not in hits)
        )
        lines += [f"{'first wrong token, ' + name:37s}{found}"] if hits else []
    return "\n".join(lines)


def text_table(title: str, columns: list[str], rows: dict[str, list], width: int = 18) -> str:
    """Aligned text; a cell is [mean, low, high], a number, or None.

    >>> print(text_table("best of", ["1", "2"], {"random": [[0.5, 0.4, 0.6], None]}))
    best of                            1                 2
    random             0.50 [0.40, 0.60]                 -
    """

    def cell(value) -> str:
        if isinstance(value, list):
            return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"
        return "-" if value is None else f"{value:.2f}"

    lines = [f"{title:18s}" + "".join(f"{column:>{width}s}" for column in columns)]
    for name, values in rows.items():
        lines.append(f"{name:18s}" + "".join(f"{cell(value):>{width}s}" for value in values))
    return "\n".join(lines)


def show_results(results: dict) -> str:
    """`rerank_results` under "rerank" and, if there, `localise_results` under "localise", as text."""
    ranking = results["rerank"]
    ns = [key for key in ranking if key.isdigit()]
    ways = {name: [ranking[n][name] for n in ns] for name in ranking[ns[0]]}
    at_k = {name: [ranking[name][n] for n in ns] for name in ("pass@k", "success@k") if name in ranking}
    areas = {name: [area] for name, area in ranking["auroc"].items()}
    parts = [text_table("best of n =", ns, ways), text_table("k =", ns, at_k)]
    parts.append(text_table("right from wrong", ["AUROC"], areas))
    titles = {"natural": "the policy's own errors", "single": "expert traces with a single thing broken"}
    for kind, found in results.get("localise", {}).items():
        rows = {name: [found[m][name] for m in ("hit0", "hit1", "step")] for name in found.get("hit0", {})}
        parts.append(f"first wrong token of {found['count']} traces: {titles[kind]}\n"
                     + text_table("", ["Hit@0", "Hit@1", "same step"], rows))  # fmt: skip
    return "\n\n".join(parts)
