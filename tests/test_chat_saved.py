"""What is saved serves as it was trained: the template, the prompt it makes, and the token that ends a turn."""

import pytest
from chat_kit import NAMES, fresh, message, template, tokenizer_of
from conftest import make_model, make_tokenizer
from transformers import AutoTokenizer, GenerationConfig

from ftune import chat
from ftune.artifacts import companions

MESSAGES = [message("user", "Hi"), message("assistant", "Yo"), message("user", "And?"), message("assistant", "So")]


@pytest.mark.parametrize("name", NAMES)
def test_saved_folder_prompts_and_stops_as_trained(name, tmp_path):
    """Cases 5 and 17."""
    tokenizer = tokenizer_of(name)
    rendered = chat.render_messages(tokenizer, MESSAGES)
    tokens = chat.tokenize(tokenizer, rendered)
    trained_end = next(label for label in reversed(tokens.labels) if label != -100)
    companions.save_companions(tmp_path, make_model(), tokenizer)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for count, (start, _) in zip((1, 3), rendered.spans, strict=True):
        prompt = saved.apply_chat_template(MESSAGES[:count], tokenize=False, add_generation_prompt=True)
        assert rendered.text[:start] == prompt
    ids = saved.apply_chat_template(MESSAGES[:3], add_generation_prompt=True, return_dict=False)
    assert tokens.input_ids[: len(ids)] == ids
    assert tokens.supervised[len(ids)]
    stops = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert trained_end in (stops if isinstance(stops, list) else [stops])


def test_saved_folder_has_the_template_that_the_recipe_gave(tmp_path):
    """Case 17: not the base's own."""
    fresh("chatml").save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = template("phi4").replace("<|im_sep|>", "\n")
    companions.save_companions(tmp_path / "saved", make_model(), tokenizer)
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.chat_template == tokenizer.chat_template
    assert saved.apply_chat_template(MESSAGES, tokenize=False) == chat.render_messages(tokenizer, MESSAGES).text


def test_the_bases_own_stops_do_not_replace_the_trained_one(tmp_path):
    """Case 5: a base whose generation config stops elsewhere."""
    model, tokenizer = make_model(), make_tokenizer()
    model.generation_config.eos_token_id = 77
    companions.save_companions(tmp_path, model, tokenizer)
    stops = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops
    assert tokenizer.eos_token_id in stops
