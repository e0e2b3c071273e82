"""The methods, by the name a recipe calls them."""

from ftune.methods import (
    adalora,
    bitfit,
    bottleneck,
    dora,
    full,
    ia3,
    linear_probe,
    lora,
    prefix_tuning,
    prompt_tuning,
    vera,
)
from ftune.methods.base import Method

METHODS: dict[str, Method] = {
    "full": full.METHOD,
    "linear_probe": linear_probe.METHOD,
    "lora": lora.METHOD,
    "qlora": lora.METHOD,
    "dora": dora.METHOD,
    "adalora": adalora.METHOD,
    "vera": vera.METHOD,
    "ia3": ia3.METHOD,
    "bitfit": bitfit.METHOD,
    "bottleneck": bottleneck.METHOD,
    "prefix_tuning": prefix_tuning.METHOD,
    "prompt_tuning": prompt_tuning.METHOD,
}
