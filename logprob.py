from engine.logprob import *  # shim until the module moves
from engine.logprob import logprobs, entropies, expected_reward, all_logprobs, output_layer, half_precision
