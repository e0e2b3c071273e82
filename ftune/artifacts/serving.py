"""What vLLM serves as it is: LoRA adapters, but not every one that PEFT has.

From its `vllm/lora/peft_helper.py`: it refuses modules_to_save and DoRA, and scales every layer by lora_alpha / r (or
its rank-stabilized form), whatever rank_pattern and alpha_pattern say. See docs/methods.md.
"""

from collections.abc import Mapping
from typing import Any


def obstacle_in_vllm(config: Mapping[str, Any] | None) -> str:
    """Why vLLM cannot serve an adapter with this adapter_config.json as it is; empty when it can."""
    if config is None or config["peft_type"] != "LORA":
        return "it serves LoRA adapters alone"
    if config.get("use_dora"):
        return "it does not know DoRA's magnitudes"
    if modules := config.get("modules_to_save"):
        return f"it takes no modules trained in full ({', '.join(modules)})"
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    if patterns:
        return f"it scales all layers alike, without a word, and does not read {' and '.join(patterns)}"
    if config.get("bias", "none") != "none":
        return "it takes no biases"
    return ""
