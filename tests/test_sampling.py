import numpy as np
import pytest

from slimline.errors import DataError
from slimline.sampling import GREEDY, Sampling, pick, pieces, until


class Bytes:
    """A tokenizer whose tokens are bytes: characters come together only when they are whole."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


def joined(text, prompt=b""):
    return list(pieces(text.encode(), list(prompt), Bytes()))


def test_the_likeliest_token_is_taken_and_of_equals_the_lower():
    assert pick(np.array([0, 3, 1, 3], np.float32), GREEDY, GREEDY.draw()) == 1


def test_tokens_are_drawn_as_often_as_their_probability_says():
    how = Sampling.of({"temperature": 2.0, "seed": 1})
    logits = 2 * np.log(np.array([0.5, 0.3, 0.2], np.float32))
    draw = how.draw()
    drawn = np.bincount([pick(logits, how, draw) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.2], atol=0.03)  # four standard errors


def test_top_p_draws_among_the_fewest_tokens_that_hold_it():
    how = Sampling.of({"temperature": 1.0, "top_p": 0.7})
    logits, draw = np.log(np.array([0.2, 0.5, 0.3], np.float32)), how.draw()
    assert {pick(logits, how, draw) for _ in range(300)} == {1, 2}
    alone = Sampling.of({"temperature": 1.0, "top_p": 0.4})
    assert {pick(logits, alone, draw) for _ in range(100)} == {1}


def test_a_seed_means_one_answer():
    how, logits = Sampling.of({"temperature": 1.0, "seed": 7}), np.zeros(50, np.float32)
    first, second = ([pick(logits, how, draw) for _ in range(10)] for draw in (how.draw(), how.draw()))
    assert first == second and len(set(first)) > 3


@pytest.mark.parametrize("text", ["plain", "naïve café", "🙂👩‍👩‍👧‍👦", "שלום", "a" * 50 + "é"])
def test_pieces_are_whole_characters_and_together_the_text(text):
    parts = joined(text, b"what went before")
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)


def test_half_a_character_at_the_end_is_said_and_not_lost():
    assert "".join(pieces("é".encode()[:1], [], Bytes())) == "\ufffd"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["one", " two", " STOP", " more"], "one two "),
        (["one S", "T", "O", "P!"], "one "),
        (["one ST", "ART"], "one START"),
        (["one", "END"], "one"),
        (["no end"], "no end"),
        (["STSTOP"], "ST"),
    ],
)
def test_an_answer_ends_before_the_first_stop(parts, expected):
    assert "".join(until(["STOP", "END"], parts)) == expected


def test_nothing_of_a_stop_is_ever_shown():
    assert list(until(["STOP"], ["a", "S", "T", "b"])) == ["a", "STb"]


@pytest.mark.parametrize(
    ("given", "name"),
    [({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"max_tokens": "many"}, "max_tokens"),
     ({"heat": 1}, "heat")],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_in_one_sentence(given, name):
    with pytest.raises(DataError, match=name) as error:
        Sampling.of(given)
    assert "\n" not in str(error.value)


def test_one_stop_may_be_a_text_and_none_may_be_empty():
    assert Sampling.of({"stop": "end"}).stop == ("end",)
    assert Sampling.of({"stop": "", "seed": None}) == GREEDY
    assert Sampling.of({"stop": ["", "a"]}).stop == ("a",)
