"""Exercise 1: which tokens count? In the repository: data.py, `Batch.response_mask`.

A batch holds questions (q) and responses side by side, padded on the right. B rows, T columns:

    column     0     1     2     3     4     5
    row 0      q     q     a     b    end   pad      prompt_length 2, length 5
    row 1      q     a    end   pad   pad   pad      prompt_length 1, length 3

The end token is an action like any other: the policy chooses to stop, and has to learn when.
Many tokenizers pad with the end token. Here both are 0.
"""

import torch


def response_mask(
    tokens: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """1.0 on response tokens, the end token included; 0.0 on the question and on padding.
    [B, T], [B], [B] -> [B, T]

        mask[b, t] = 1 if prompt_lengths[b] <= t < lengths[b] else 0

    >>> tokens = torch.tensor([[5, 6, 7, 8, 0, 0], [5, 7, 0, 0, 0, 0]])
    >>> response_mask(tokens, torch.tensor([2, 1]), torch.tensor([5, 3]))
    tensor([[0., 0., 1., 1., 1., 0.],
            [0., 1., 1., 0., 0., 0.]])
    """
    raise NotImplementedError("response_mask in ex1_masks.py")


def labels(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The targets of a cross-entropy: the token where mask is 1, -100 elsewhere.
    [B, T], [B, T] -> [B, T]

    -100 is what torch.nn.functional.cross_entropy leaves out (its `ignore_index`). `tokens` must
    stay as they are: the model still has to read them.

    >>> labels(torch.tensor([[5, 7, 0, 0]]), torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    tensor([[-100,    7,    0, -100]])
    """
    raise NotImplementedError("labels in ex1_masks.py")
