"""What a user of transformers waits for before anything else: its imports, and a model drawn at random.

`python -m benchmarks.start_plain CONFIG TYPE`, CONFIG as JSON for `LlamaConfig`, TYPE of the weights.
"""

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM._from_config(LlamaConfig(**json.loads(sys.argv[1])), dtype=getattr(torch, sys.argv[2]))
