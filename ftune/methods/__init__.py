"""The methods, by the name a recipe calls them."""

from typing import cast

from ftune.methods import full, lora
from ftune.methods.base import Method

METHODS: dict[str, Method] = {
    "full": cast(Method, full),
    "lora": cast(Method, lora),
}
