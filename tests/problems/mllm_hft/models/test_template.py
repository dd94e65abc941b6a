"""White space, turns and answers as a template or a model's own chat template writes them."""

from __future__ import annotations

import pytest

from bilevel.errors import ProblemError
from bilevel_problems.mllm_hft.models.instructions import before, conversations, prompts, turn_ids
from bilevel_problems.mllm_hft.models.pretrain import answer_words
from bilevel_problems.mllm_hft.models.template import Template, from_chat
from bilevel_problems.mllm_hft.models.tokenizer import PretrainedTokenizer, until_end
from tests.problems.mllm_hft.models.folders import CHATML, IDEFICS, VICUNA, sentencepiece

PLAIN = "USER: <image>\n{prompt} ASSISTANT:"
SYSTEM = "A chat. It is polite. "
ASKED = "is there a dog ?"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return sentencepiece(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(raw):
    return PretrainedTokenizer(raw, picture=raw.convert_tokens_to_ids("<image>"))


def test_white_space_after_the_picture_is_the_templates():
    template = Template(PLAIN)
    assert template.before == "USER: "
    assert template.prompt(ASKED, first=True) == "\nis there a dog ? ASSISTANT:"
    assert template.answer("yes") == " yes"


@pytest.mark.parametrize("opening", ["", SYSTEM])
def test_later_turns_have_no_picture_no_newline_and_no_system_text(opening):
    later = Template(opening + PLAIN).prompt(ASKED, first=False)
    assert later == "USER: is there a dog ? ASSISTANT:"


@pytest.mark.parametrize(
    ("turn", "later"),
    [
        ("[INST] <image>\n{prompt} [/INST]", "[INST] x [/INST]"),
        ("Be brief.\n### Human: <image>\n{prompt}\n### Assistant:", "### Human: x\n### Assistant:"),
        (
            "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n<image>\n{prompt}<|im_end|>",
            "<|im_start|>user\nx<|im_end|>",
        ),
    ],
)
def test_the_users_mark_is_said_again_whatever_it_looks_like(turn, later):
    assert Template(turn).prompt("x", first=False) == later


def test_an_answer_begins_where_the_template_ends():
    template = Template("<|im_start|>user\n<image>{prompt}<|im_end|>\n<|im_start|>assistant\n")
    asked = template.prompt(ASKED, first=True)
    assert f"{asked}{template.answer('yes')}".endswith("assistant\nyes")


@pytest.mark.parametrize(
    "turn", ["{prompt}", "<image>", "<image><image>{prompt}", "{prompt} <image>"]
)
def test_a_template_needs_its_places(turn):
    with pytest.raises(ProblemError, match="once each"):
        Template(turn)


def rendered(raw, chat, messages, opens):
    return raw.apply_chat_template(
        messages, chat_template=chat, tokenize=False, add_generation_prompt=opens
    )


def message(role, text, seen=False):
    picture = [{"type": "image"}] if seen else []
    return {"role": role, "content": [*picture, {"type": "text", "text": text}]}


TURNS = [("Is there a dog?", "yes"), ("And a cat?", "no"), ("Why?", "it is dark")]
CHATS = {
    "vicuna": VICUNA,
    "chatml": CHATML.replace("PICTURE", "<|vision_start|><image><|vision_end|>"),
    "idefics": IDEFICS,
}


def closing(raw):
    return [t for t in ("</s>", "<|im_end|>", "<end_of_utterance>") if t in raw.get_vocab()]


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_template_is_written_as_it_renders(name, raw, tokenizer):
    """Three turns: ids of the rendered text, an end token added where the chat template has none."""
    chat = CHATS[name]
    template = from_chat(lambda m, o: rendered(raw, chat, m, o), "<image>", closing(raw))
    messages = []
    for i, (asked, said) in enumerate(TURNS):
        messages += [message("user", asked, seen=i == 0), message("assistant", said)]
    text = rendered(raw, chat, messages, False)
    if name == "vicuna":
        for _, said in TURNS:
            text = text.replace(f"ASSISTANT: {said} ", f"ASSISTANT: {said}</s> ")
    text = text.removesuffix(" ").removesuffix("\n")
    rows = conversations([TURNS], tokenizer, template)
    ids = [*before(tokenizer, template), tokenizer.picture, *rows.ids[0].tolist()]
    theirs = raw.encode(text, add_special_tokens=False)
    assert ids == (theirs if text.startswith("<s>") else [1, *theirs])
    said = raw.decode(rows.ids[0][rows.counted[0]])
    assert [word in said for word in ("yes", "no", "it is dark", "dog", "Why")] == [
        *[True] * 3,
        *[False] * 2,
    ]


def test_a_system_text_stands_once(raw, tokenizer):
    chat = CHATS["chatml"]
    template = from_chat(lambda m, o: rendered(raw, chat, m, o), "<image>", closing(raw))
    rows = conversations([TURNS], tokenizer, template)
    text = raw.decode([*before(tokenizer, template), *rows.ids[0].tolist()])
    assert text.count("You are helpful") == 1
    assert text.count("<|im_start|>user\n") == 3


def test_a_chat_template_of_plain_text_gets_the_pictures_token(raw):
    chat = "{% for m in messages %}[{{ m.role }}] {{ m.content + '' }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    template = from_chat(lambda m, o: rendered(raw, chat, m, o), "<image>", closing(raw))
    assert template.turn == "[user] <image>\n{prompt}\n[assistant] "
    assert template.answer("yes") == "yes"


def test_a_chat_template_that_writes_no_picture_is_refused(raw):
    chat = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(
        ProblemError, match=r"chat template cannot be read.*problem\.model\.template"
    ):
        from_chat(lambda m, o: rendered(raw, chat, m, o), "<image>", closing(raw))


def test_prompts_are_the_start_of_what_training_reads(tokenizer):
    template = Template(PLAIN)
    asked, said = turn_ids((ASKED, "yes"), tokenizer, template, first=True)
    row = prompts([ASKED], tokenizer, template)
    assert row.ids[0, :-1].tolist() == asked
    assert int(row.prefix[0]) == len(asked)
    assert tokenizer.decode(said) == "yes"
    assert said[-1] == tokenizer.end


def test_a_word_is_written_as_behind_the_picture_and_not_as_at_a_start(tokenizer):
    behind = tokenizer.encode("USER", tokenizer.picture)
    assert behind != tokenizer.encode("USER")  # the negative control: the two differ here
    assert tokenizer.tokenizer.encode("<image>USER", add_special_tokens=False)[1:] == behind


@pytest.mark.parametrize("turn", [PLAIN, PLAIN + "\n"])
def test_answers_count_in_every_spelling_of_the_vocabulary(turn, tokenizer):
    """ "▁yes" and "▁Yes" behind a colon, "yes" and "Yes" behind a newline: all four are words; "YES" is none."""
    yes, no = answer_words(tokenizer, Template(turn))
    said = {tokenizer.tokenizer.convert_ids_to_tokens(i) for i in (*yes, *no)}
    assert {"▁yes", "▁Yes", "▁no", "▁No"} <= said
    if turn.endswith("\n"):
        assert {"yes", "Yes", "no", "No"} <= said
    assert not set(yes) & set(no)
    assert all(tokenizer.decode([i]).strip().lower() == "yes" for i in yes)
    # of what takes several tokens none counts: a first one alone says nothing
    shout = tokenizer.encode("YES")
    assert len(shout) == 2
    assert not set(shout) & set(yes)
    assert "▁NO" in said  # one token


def test_a_pad_token_without_a_row_is_replaced_and_another_refused(raw):
    rows = len(raw)
    short = PretrainedTokenizer(raw, rows=rows - 1)
    last = raw.convert_ids_to_tokens(rows - 1)
    with pytest.raises(ProblemError, match=r"row_3_col_3.*resize_token_embeddings"):
        short.encode(f"a {last}")
    assert short.encode("a cat")


def test_generated_text_is_over_at_any_end_token():
    assert until_end([5, 6, 9, 5], (2, 9)) == ([5, 6], True)
    assert until_end([5, 6, 2, 9], (2, 9)) == ([5, 6], True)
    assert until_end([5, 6], (2, 9)) == ([5, 6], False)
