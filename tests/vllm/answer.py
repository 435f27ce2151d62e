"""What vLLM thinks of every next token: `answer.py FOLDER < ids`, in its own Python, for it wants older transformers.

Reads lists of token ids as JSON, and writes the logarithm of the probability of each but the first.
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main(folder):
    from vllm import LLM, SamplingParams

    texts = json.load(sys.stdin)
    model = LLM(model=folder, enforce_eager=True, max_model_len=128, dtype="bfloat16")
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = model.generate([{"prompt_token_ids": ids} for ids in texts], asked, use_tqdm=False)
    said = [[at[i].logprob for at, i in zip(one.prompt_logprobs[1:], ids[1:])] for one, ids in zip(found, texts)]
    print(json.dumps(said))


if __name__ == "__main__":  # vLLM may start this file again
    main(sys.argv[1])
