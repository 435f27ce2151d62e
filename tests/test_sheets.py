import json

import numpy as np
import pytest
import torch

from slimline import decoder, sheets
from slimline.errors import DataError
from slimline.sheets import Document
from tests.decoders import KINDS, make_decoder


def test_documents_lie_one_behind_the_other_and_only_what_follows_within_one_counts():
    laid = sheets.lay([Document([1, 2, 3]), Document([4, 5])], 8, fill=9)
    assert laid.ids_NT.tolist() == [[1, 2, 3, 4, 5, 9, 9, 9]]
    assert laid.positions_NT.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert laid.counted_NT.astype(int).tolist() == [[1, 1, 0, 1, 0, 0, 0, 0]]


def test_a_prompt_is_read_and_not_learned():
    laid = sheets.lay([Document([1, 2, 3, 4, 5], start=3)], 5)
    assert laid.counted_NT.astype(int).tolist() == [[0, 0, 1, 1, 0]]  # the tokens 4 and 5 are predicted
    longer = sheets.lay([Document([1, 2, 3, 4, 5, 6], start=4)], 3)
    assert longer.counted_NT.astype(int).tolist() == [[0, 0, 0], [1, 1, 0]]


def test_each_document_goes_where_it_leaves_least_room():
    laid = sheets.lay([Document([1] * 6), Document([2] * 7), Document([3] * 3), Document([4] * 4)], 10)
    assert [sorted(set(row)) for row in laid.ids_NT.tolist()] == [[2, 3], [1, 4]]


def test_some_sheets_are_drawn_by_seed_and_stay_in_order():
    laid = sheets.lay([Document([i, i]) for i in range(1, 21)], 2)
    drawn = laid.some(5, seed=1).ids_NT[:, 0].tolist()
    assert drawn == sorted(drawn) and len(set(drawn)) == 5 and drawn != laid.some(5, seed=2).ids_NT[:, 0].tolist()
    assert laid.some(99).ids_NT.tolist() == laid.ids_NT.tolist()


def test_long_documents_are_cut_and_no_token_is_lost():
    draw = np.random.default_rng(0)
    documents = [Document(list(range(100 * i, 100 * i + int(draw.integers(2, 50))))) for i in range(1, 40)]
    laid = sheets.lay(documents, 16, fill=0)
    pieces = [ids[at : at + 16] for ids, _ in documents for at in range(0, len(ids), 16)]
    expected = sorted(token for piece in pieces if len(piece) > 1 for token in piece)
    assert sorted(laid.ids_NT[laid.ids_NT > 0].tolist()) == expected
    assert laid.counted_NT.sum() == sum(len(piece) - 1 for piece in pieces)
    assert (laid.ids_NT == 0).mean() < 0.05


def test_text_without_a_token_to_learn_is_refused():
    with pytest.raises(DataError, match="no token to learn"):
        sheets.lay([Document([5])], 8)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_on_a_sheet_do_not_see_each_other(kind, tmp_path):
    folder = make_decoder(kind, tmp_path / kind, positions=64)
    if kind in ("mistral", "gemma2", "gemma3_text", "phi3"):  # a window must not reach over either
        config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 6}
        (folder / "config.json").write_text(json.dumps(config))
    model = decoder.load(folder)
    documents = [Document(list(range(2, 14))), Document(list(range(8, 20))), Document([7, 3, 9, 4])]
    laid = sheets.lay(documents, 32)
    assert len(laid) == 1
    with torch.no_grad():
        ids_1T, positions_1T = torch.from_numpy(laid.ids_NT), torch.from_numpy(laid.positions_NT)
        together = model(**sheets.inputs(model, ids_1T, positions_1T)).logits[0]
        at = 0
        for ids, _ in documents:
            alone = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            torch.testing.assert_close(together[at : at + len(ids)], alone, atol=2e-5, rtol=1e-4)
            at += len(ids)
