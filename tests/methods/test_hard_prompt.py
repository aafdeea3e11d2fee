"""Hard prompts: ids of templates, what goes when they are too long, chats, demonstrations, verbalizers, choices."""

from dataclasses import replace

import pytest
import torch

import models
from peftops import HardPrompt, Verbalizer, choice_scores, demonstrations
from peftops.prompts.hard_prompt import joint

plain, chatty = models.tokenizer(chat=False), models.tokenizer()
ROWS = tuple({"text": f"review number {i}", "label": ("good", "bad", "so so")[i % 3]} for i in range(9))
PROMPT = HardPrompt("Review: {text}\nIs:||| {label}", ROWS[:2], "Judge {braces stay}.", shorten="text")


def spaced():
    """A tokenizer that merges a space with what follows, and begins and ends with tokens of its own."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "g"), ("Ġg", "o"), ("Ġ", "b"), (":", "Ġ")]
    names = ["<unk>", "<s>", "</s>", *letters, *("".join(m) for m in merges)]
    bpe = Tokenizer(kinds.BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_ids_are_those_of_the_text_put_together_by_hand():
    made = PROMPT.encode(plain, ROWS[5])
    text = (
        "Judge {braces stay}.\n\nReview: review number 0\nIs: good\n\nReview: review number 1\nIs: bad\n\n"
        "Review: review number 5\nIs: so so"
    )
    assert made.ids == plain(text)["input_ids"] and plain.decode(made.ids[-made.targets :]) == " so so"
    assert PROMPT.encode(plain, ROWS[5]) == made  # nothing random
    open_ = PROMPT.encode(plain, {"text": ROWS[5]["text"], "label": ""}, target=False)
    assert open_.ids == made.ids[: -made.targets] and open_.targets == 0
    zero = replace(PROMPT, demonstrations=(), instruction="")
    assert zero.encode(plain, ROWS[5]).ids == plain("Review: review number 5\nIs: so so")["input_ids"]
    turned = replace(PROMPT, demonstrations=ROWS[1::-1]).encode(plain, ROWS[5])
    tail = len("Review: review number 5\nIs: so so")
    assert turned.ids != made.ids and turned.ids[-tail:] == made.ids[-tail:]
    assert HardPrompt("{{{a}}}|||b").text({"a": 1}) == ("{1}", "b")


def test_context_and_continuation_are_encoded_together():
    tokenizer = spaced()
    for context, continuation in [("Is:", " good"), ("Is: ", "good"), ("Is:  ", "bad"), ("", "good"), ("Is:", " x")]:
        made = joint(tokenizer, context, continuation)
        assert made.ids == [1, *tokenizer(context + continuation, add_special_tokens=False)["input_ids"]]
        assert 2 not in made.ids  # one beginning, and no end
        assert tokenizer.decode(made.ids[1:]) == context + continuation
        assert tokenizer.decode(made.ids[len(made.ids) - made.targets :]).strip() == continuation.strip()
    together, apart = joint(tokenizer, "Is: ", "good"), tokenizer("Is: ", add_special_tokens=False)["input_ids"]
    assert together.ids[1 : 1 + len(apart)] != apart


def test_whole_demonstrations_go_first_and_then_the_end_of_the_field():
    whole = len(PROMPT.encode(plain, ROWS[5]).ids)
    demo = len("Review: review number 0\nIs: good\n\n")
    fits = PROMPT.encode(plain, ROWS[5], whole)
    assert len(fits.ids) == whole
    less = PROMPT.encode(plain, ROWS[5], whole - 1)
    assert len(less.ids) == whole - demo and "number 0" not in plain.decode(less.ids)  # the oldest, and all of it
    head = len("Judge {braces stay}.\n\n")
    none = len(replace(PROMPT, demonstrations=()).encode(plain, ROWS[5]).ids)
    cut = PROMPT.encode(plain, ROWS[5], none - 4)
    assert plain.decode(cut.ids) == "Judge {braces stay}.\n\nReview: review numb\nIs: so so"
    cut = replace(PROMPT, keep="end").encode(plain, ROWS[5], none - 4)
    assert plain.decode(cut.ids)[head:] == "Review: ew number 5\nIs: so so" and cut.targets == len(" so so")
    empty = PROMPT.encode(plain, ROWS[5], none - len("review number 5"))
    assert plain.decode(empty.ids)[head:] == "Review: \nIs: so so"
    with pytest.raises(ValueError, match="with nothing left to cut, do not fit into"):
        PROMPT.encode(plain, ROWS[5], none - len("review number 5") - 1)
    with pytest.raises(ValueError, match="with nothing left to cut, do not fit into 10"):
        replace(PROMPT, shorten=None).encode(plain, ROWS[5], 10)
    masked = HardPrompt("{text} is [MASK]|||", shorten="text").encode(plain, ROWS[0], 14)
    assert plain.decode(masked.ids) == "revi is [MASK]"


def test_a_chat_has_demonstrations_as_turns_and_one_beginning():
    made = replace(PROMPT, chat=True).encode(chatty, ROWS[5])
    assert chatty.decode(made.ids) == (
        "<s>u:Judge {braces stay}.\n\nReview: review number 0\nIs:</s><s>a:good</s>"
        "<s>u:Review: review number 1\nIs:</s><s>a:bad</s><s>u:Review: review number 5\nIs:</s><s>a:so so</s>"
    )
    assert chatty.decode(made.ids[-made.targets :]) == "so so</s>" and made.ids[:2] != [1, 1]
    short = replace(PROMPT, chat=True).encode(chatty, ROWS[5], len(made.ids) - 1)
    assert "number 0" not in chatty.decode(short.ids)
    with pytest.raises(ValueError, match="no chat template"):
        replace(PROMPT, chat=True).encode(plain, ROWS[5])


def test_saved_and_loaded_it_is_the_same(tmp_path):
    PROMPT.save(tmp_path / "prompt.json")
    assert HardPrompt.load(tmp_path / "prompt.json") == PROMPT


def test_demonstrations():
    assert demonstrations(ROWS, 4) == demonstrations(ROWS, 4) != demonstrations(ROWS, 4, seed=1)
    assert len(demonstrations(ROWS, 9)) == 9 and demonstrations(ROWS, 0) == ()
    even = demonstrations([*ROWS, *({"text": "x", "label": "good"} for _ in range(20))], 6, by="label")
    assert sorted(row["label"] for row in even) == ["bad"] * 2 + ["good"] * 2 + ["so so"] * 2
    rows = [{"text": t} for t in ("xyz", "abcd", "abc", "qqq")]
    near = demonstrations(rows, 2, like="abce", field="text", tokenizer=plain)
    assert [row["text"] for row in near] == ["abcd", "abc"]  # the closest last
    for how, message in [
        ({"k": 10}, r"k must be a whole number in \[0, 10\)"),
        ({"k": 2, "by": "class"}, "row 0 lacks one of class"),
        ({"k": 2, "like": "x"}, "like needs a field to compare with and a tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            demonstrations(ROWS, **how)


def test_a_verbalizer_scores_classes_by_their_words():
    words = Verbalizer({"yes": ["<!>y", "<!>Y"], "no": ["<!>n"]})
    ids = words.ids(plain)
    assert [plain.decode(i) for i in ids["yes"]] == ["y", "Y"]
    assert plain.decode(Verbalizer({"yes": ["y"]}).ids(plain)["yes"]) == " "  # a space goes first
    logits = torch.randn(2, 320, generator=torch.Generator().manual_seed(0))
    joint_ = logits[:, [*ids["yes"], *ids["no"]]].log_softmax(-1)
    want = torch.stack([joint_[:, :2].mean(1), joint_[:, 2]], 1)
    torch.testing.assert_close(words.scores(plain, logits), want)
    bias = torch.randn(320)
    same = words.scores(plain, logits + bias, neutral=bias)
    torch.testing.assert_close(same, words.scores(plain, logits), rtol=1e-4, atol=1e-4)  # calibrated away
    with pytest.raises(ValueError, match="words of 'yes' and 'no' begin with the same token, 'y'"):
        Verbalizer({"yes": ["<!>yes"], "no": ["<!>yo"]}).ids(plain)
    with pytest.raises(ValueError, match="class 'no' needs words that have tokens"):
        Verbalizer({"yes": ["<!>y"], "no": []}).ids(plain)
    model = models.llama()
    ids_ = torch.tensor([PROMPT.encode(plain, ROWS[5], target=False).ids])
    best = words.scores(plain, model(ids_).logits[0, -1]).argmax()
    assert words.classify(model, plain, PROMPT, ROWS[5]) == ("yes", "no")[best]


def test_choices_score_their_log_probability():
    model, context = models.llama(), "Is:"
    got = choice_scores(model, plain, context, [" good", " bad"])
    for choice, score in zip([" good", " bad"], got, strict=True):
        ids = torch.tensor([plain(context + choice)["input_ids"]])
        chances = model(ids).logits[0].log_softmax(-1)
        want = sum(chances[i - 1, ids[0, i]].item() for i in range(len(context), ids.shape[1]))
        assert score == pytest.approx(want, rel=1e-4)
    by_bytes = choice_scores(model, plain, context, [" good", " bad"], normalize="bytes")
    assert by_bytes == pytest.approx([got[0] / 5, got[1] / 4])
    (umlauts,), (by_bytes,) = (choice_scores(model, plain, context, [" öäü"], normalize=n) for n in ("none", "bytes"))
    assert by_bytes == pytest.approx(umlauts / 7)
    long = "padding " * 20 + context
    assert choice_scores(model, plain, long, [" good"], max_length=8) == pytest.approx(got[:1], rel=1e-4)
    with pytest.raises(ValueError, match="'' has 0 tokens"):
        choice_scores(model, plain, context, [""])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: HardPrompt("{text} {label}"), r"needs '\|\|\|' exactly once"),
        (lambda: HardPrompt("{text}|||{a}|||"), "exactly once"),
        (lambda: HardPrompt("{text|||"), "cannot be read"),
        (lambda: HardPrompt("{}|||x"), "plain names in braces"),
        (lambda: HardPrompt("{a.b}|||x"), "plain names in braces"),
        (lambda: HardPrompt("{a:>3}|||x"), "plain names in braces"),
        (lambda: HardPrompt("{a}|||{b}", shorten="b"), "shorten='b' is not a field of the prompt"),
        (lambda: HardPrompt("{a}|||{b}", keep="middle"), "keep must be one of 'start', 'end'"),
        (lambda: HardPrompt("{a}|||{b}", ({"a": 1},)), "the template needs b; the row has a"),
        (lambda: PROMPT.encode(plain, {"label": "x"}), "the template needs text; the row has label"),
    ],
)
def test_bad_input_gets_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
