"""`ilvr train` as a script, for launchers that want one; an error shows its traceback.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_ilvr.py \\
        --config examples/recipes/qwen2_5_vl_7b.yaml --dataset data/train.jsonl
"""

import sys

from ilvr_commands.main import main


if __name__ == "__main__":
    sys.exit(main(["train", "--traceback", *sys.argv[1:]]))
