#!/bin/sh
# Checks to run on a GPU after a change: about eight minutes on an H100. Needs peft, but no network:
#
#     sh scripts/check_gpu.sh data/alpaca checkpoints/smollm2-135m-instruct
#
# Only the tokenizer and config.json of the second folder are read.
set -e
data=${1:-data/alpaca}
base=${2:-checkpoints/smollm2-135m-instruct}
python -m pytest -q tests/test_cuda.py
for method in adapter lora; do
    python scripts/profile_step.py --model 7B --method $method --batch_size 64 --micro_batch_tokens 8192
    python scripts/profile_step.py --model 7B --method $method --batch_size 64 --micro_batch_tokens 8192 --compile
    python scripts/benchmark.py --model 7B --checkpoint_dir "$base" --data "$data" --kinds '[train]' \
        --methods "[$method]" --variants '[bf16-true, bf16-true+compile]' --batch_size 64 --micro_batch_tokens 8192 \
        --rounds 2 --steps 1 --against '[peft]' --micro_batch_samples 16
done
python scripts/benchmark.py --model 7B --checkpoint_dir "$base" --data "$data" --kinds '[decode]' --methods '[adapter]' \
    --variants '[bf16-true]' --new_tokens 100 --rounds 2
