"""configs/gella_vicuna_7b.py with Vicuna-13B; argument: full or lora.

python train.py --config=configs/gella_vicuna_13b.py:lora --workdir=runs/gella_13b \\
    --config.init_from=llava-1.5-13b.safetensors --config.tokenizer=llava-1.5-13b/tokenizer.model
"""

from configs.gella_vicuna_7b import get_13b


def get_config(train: str = "full"):
    return get_13b(train)
