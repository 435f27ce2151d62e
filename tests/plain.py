"""What plain transformers makes of a folder, and of some tokens."""

import torch

from slimline import decoder


def tokens(rows=3, length=20, vocabulary=29, seed=1):
    """int64 [rows, length], drawn by seed."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens_BT=None):
    with torch.inference_mode():
        return model(input_ids=tokens() if tokens_BT is None else tokens_BT, use_cache=False).logits


def assert_reads_the_same(folder):
    """transformers loads it without a complaint, and answers as our own reader does. Returns the logits."""
    from transformers import AutoModelForCausalLM

    ours = logits(decoder.load(folder))
    model, notes = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    theirs = logits(model.eval())
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    return ours
