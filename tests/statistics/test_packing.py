"""Packed rows: where their documents are, and how they are cut out."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from fishkern.layers import Documents, Span
from fishkern.statistics.batches import Reader
from fishkern.statistics.borders import document_numbers
from fishkern.statistics.data import Data
from fishkern.statistics.packing import PackedExamples, inside_documents, packed_examples

IDS = torch.arange(1, 13).view(2, 6)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]])
NUMBERS = [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1]]


VIDEO = [(0, 0, 0), (1, 1, 1), (7, 1, 1), (13, 1, 1), (2, 2, 2), (3, 3, 3)]  # time, height, width of one document


def batch(**entries) -> dict:
    return {"input_ids": IDS, "labels": IDS, "position_ids": POSITIONS, **entries}


def labelled(content) -> Tensor:
    """As a causal language model reads them: the next label of the same document."""
    labels = torch.nn.functional.pad(torch.as_tensor(content["labels"]), (0, 1), value=-100)[:, 1:]
    return inside_documents(labels, content) != -100


def read(content, shared: str = "") -> PackedExamples:
    return packed_examples(content, labelled(content), 0, lambda place: place == (shared,))


BORDERS = {
    "positions": batch(),
    "numpy": {key: value.numpy() for key, value in batch().items()},
    "positions from 2": batch(position_ids=POSITIONS + 2),
    "a jump": batch(position_ids=torch.tensor([[0, 1, 2, 7, 8, 3], [4, 5, 6, 7, 9, 10]])),
    "repeated positions": batch(position_ids=torch.tensor([[0, 1, 2, 2, 3, 3], [0, 1, 2, 3, 3, 4]])),
    "a mask of ones": batch(attention_mask=torch.ones_like(IDS)),
    "a mask of ones, from 2": batch(position_ids=(POSITIONS + 2).int(), attention_mask=torch.ones_like(IDS)),
    "with those of the text": batch(position_ids=torch.stack([POSITIONS, *torch.randint(9, (3, 2, 6))])),
    "of three kinds, with cu_seq_lens": batch(
        position_ids=POSITIONS.expand(3, 2, 6), cu_seq_lens_q=torch.tensor([0, 3, 5, 6, 10, 12])
    ),
    "a mask of pairs": batch(attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool)),
    "seq_idx": {"input_ids": IDS, "labels": IDS, "seq_idx": torch.tensor([[5, 5, 5, 0, 0, 7], [1, 1, 1, 1, 2, 2]])},
    "cu_seq_lens": {"input_ids": IDS, "labels": IDS, "cu_seq_lens_k": torch.tensor([0, 3, 5, 6, 10, 12])},
    "cu_seq_lens of one length": {
        "input_ids": IDS,
        "labels": IDS,
        "cu_seq_lens_q": torch.tensor([0, 3, 5, 6, 6, 10, 12, 12, 12]),
    },
    "cu_seq_lens first": batch(cu_seq_lens_q=torch.tensor([0, 3, 5, 6, 10, 12]), position_ids=POSITIONS * 0),
}


@pytest.mark.parametrize("borders", BORDERS)
def test_numbers(borders):
    assert document_numbers(BORDERS[borders]).tolist() == NUMBERS


ONE_EACH = {
    "no positions": {"input_ids": IDS, "labels": IDS},
    "ascending": batch(position_ids=torch.arange(6).expand(2, 6)),
    "ascending, of one row": batch(position_ids=torch.arange(3, 9)[None]),
    "left padding": batch(
        position_ids=torch.tensor([[1, 1, 0, 1, 2, 3]] * 2), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    ),
    "right padding": batch(
        position_ids=torch.tensor([[0, 1, 2, 0, 0, 0]] * 2), attention_mask=torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)
    ),
    "left padding, numpy": batch(
        position_ids=numpy.array([[1, 1, 0, 1, 2, 3]] * 2), attention_mask=numpy.array([[0, 0, 1, 1, 1, 1]] * 2)
    ),
    "left padding, one mask for all": batch(
        position_ids=torch.tensor([[1, 1, 0, 1, 2, 3]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]])
    ),
    "positions of three kinds": batch(position_ids=(torch.arange(6) + torch.tensor([0, 5])[:, None]).expand(3, 2, 6)),
    "behind a video time goes back": batch(position_ids=torch.tensor([VIDEO] * 2).movedim(2, 0)),
    "three kinds, left padding": batch(
        position_ids=torch.tensor([0, 0, 0, 1, 2, 3]).expand(3, 2, 6),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]] * 2),
    ),
    "jumps beside a mask of ones": batch(
        position_ids=torch.tensor([[0, 1, 2, 7, 7, 9]] * 2), attention_mask=torch.ones_like(IDS)
    ),
    "one seq_idx": batch(seq_idx=torch.tensor([[4] * 6, [5] * 6])),
    "one document": {"input_ids": IDS[:1], "labels": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 6])},
    "a pair": (IDS, IDS),
}


@pytest.mark.parametrize("rows", ONE_EACH)
def test_rows_of_one_document(rows):
    assert document_numbers(ONE_EACH[rows]) is None


@pytest.mark.parametrize("ends", [[0, 3, 11], [1, 12], [0, 7, 5, 12], [0, 5, 8, 12], []], ids=str)
def test_borders_that_do_not_fit(ends):
    """Among them is a document that goes on in the next row."""
    with pytest.raises(ValueError, match="must ascend from 0 to the number of positions, 12, with a border"):
        document_numbers(batch(cu_seq_lens_q=torch.tensor(ends, dtype=torch.int32)))


def test_a_document_of_one_token_beside_a_mask_of_ones():
    """Flash attention begins a document at each lowest position, and reads the positions beside such a mask."""
    positions = torch.tensor([[0, 0, 1, 2, 0, 0]] * 2)
    content = batch(position_ids=positions, attention_mask=torch.ones_like(IDS))
    assert document_numbers(content).tolist() == [[0, 1, 1, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"position_ids": POSITIONS * 0 + torch.arange(6)}, "at position 3 of row 0, and not by 'position_ids'"),
        ({"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)}, "at position 5 of row 0, and not by 'seq_idx'"),
        ({"cu_seq_lens_k": torch.tensor([0, 3, 6, 10, 12])}, "at position 5 of row 0, and not by 'cu_seq_lens_k'"),
    ],
    ids=["position_ids", "seq_idx", "cu_seq_lens_k"],
)
def test_entries_that_tell_other_borders_are_refused(entries, words):
    borders = torch.tensor([0, 3, 5, 6, 10, 12])
    with pytest.raises(ValueError, match=f"by 'cu_seq_lens_q' a document begins {words}.*leave it out"):
        document_numbers(batch(**{"cu_seq_lens_q": borders, **entries}))


def test_positions_of_three_kinds_that_begin_again_are_refused():
    with pytest.raises(ValueError, match=r"begin again in row 1, .*in front, \[4, R, T\].*cu_seq_lens_q"):
        positions = torch.stack([torch.arange(6), POSITIONS[1]]).expand(3, 2, 6)
        document_numbers(batch(position_ids=positions))


def test_documents_with_a_label_are_the_examples():
    examples = read(batch())
    spans = (Span(0, 0, 3), Span(0, 3, 5), Span(1, 0, 4), Span(1, 4, 6))
    assert examples.documents == Documents((2, 6), spans)
    assert (examples.num_examples, examples.dropped, examples.places) == (4, 1, range(4))
    labels = IDS.clone()
    labels[1, 1:4] = -100  # a document of which only the first token has a label, which nothing predicts
    assert read(batch(labels=labels)).documents.spans == (*spans[:2], spans[3])
    with pytest.raises(ValueError, match="batch 0 has packed rows, and none of their documents has a label"):
        read(batch(labels=IDS * 0 - 100))


SAME = torch.tensor(NUMBERS)[:, None, :, None] == torch.tensor(NUMBERS)[:, None, None]
SCORES = torch.where(SAME, torch.arange(72.0).view(2, 1, 6, 6), -torch.inf)  # what attention adds, by its place

FULL = batch(
    attention_mask=SCORES,
    weights=torch.randn(2, 6, 3),
    cu_seq_lens_q=torch.tensor([0, 3, 5, 6, 10, 12], dtype=torch.int32),
    max_length_q=4,
    max_length_k=torch.tensor(4),
    scale=torch.tensor(0.5),
    mode="plain",
    nothing=None,
)


def test_one_document_is_unpacked():
    examples = read(UserDict(FULL))
    spans = examples.documents.spans
    for n, one in enumerate(examples.singly()):
        row, start, stop = spans[n]
        content = dict(one.content)
        assert isinstance(one.content, UserDict)
        assert not isinstance(one, PackedExamples)
        assert (one.num_examples, one.places, one.documents) == (1, range(n, n + 1), None)
        for key in ("input_ids", "labels", "position_ids", "weights"):
            assert torch.equal(content.pop(key), FULL[key][row : row + 1, start:stop])
        mask = FULL["attention_mask"][row : row + 1, :, start:stop, start:stop]
        assert torch.equal(content.pop("attention_mask"), mask)
        assert content.pop("cu_seq_lens_q").tolist() == [0, stop - start]
        assert (content.pop("max_length_q"), int(content.pop("max_length_k"))) == (stop - start, stop - start)
        assert content == {"scale": FULL["scale"], "mode": "plain", "nothing": None}
        assert document_numbers(one.content) is None


def test_documents_of_one_row_are_cut_out_of_it():
    part = read(FULL).take(2, 4)
    assert part.documents == Documents((1, 6), (Span(0, 0, 4), Span(0, 4, 6)))
    assert part.content["cu_seq_lens_q"].tolist() == [0, 4, 6]
    assert torch.equal(part.content["labels"], IDS[1:])
    assert [one.content["input_ids"].tolist() for one in part.singly()] == [[[7, 8, 9, 10]], [[11, 12]]]


def test_rows_stay_whole_where_several_are_cut():
    examples = read(FULL)
    part = examples.take(1, 3)
    assert part.documents == Documents((2, 6), (Span(0, 3, 5), Span(1, 0, 4)))
    assert part.content["labels"].tolist() == [[-100, -100, -100, 4, 5, -100], [7, 8, 9, 10, -100, -100]]
    assert torch.equal(part.content["input_ids"], IDS)
    assert (part.num_examples, part.dropped, part.places) == (2, 1, range(1, 3))
    assert examples.content["labels"] is FULL["labels"]
    again = packed_examples(part.content, labelled(part.content), 0, lambda place: False)
    assert again.documents == part.documents
    assert examples.take(0, 4) is examples


def test_few_are_two_of_one_row():
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1]])
    assert read(batch(position_ids=positions)).few.places == range(1, 3)
    lone = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0]])
    assert read(batch(position_ids=lone)).few.places == range(2)
    assert read(batch()).kind != read(batch(position_ids=lone)).kind != read(FULL).kind


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (torch.zeros(3), r"of shape \(3,\)"),
        (torch.zeros(2, 5), r"of shape \(2, 5\)"),
        ([1, 2], "a list"),
        ({"inner": torch.zeros(2, 6)}, "a dict"),
        (numpy.zeros((4, 6)), r"of shape \(4, 6\)"),
    ],
    ids=["vector", "other positions", "list", "mapping", "numpy"],
)
def test_what_cannot_be_cut_is_refused_by_name(entry, words):
    with pytest.raises(ValueError, match=f"'side' is {words}, which cannot be cut into documents.*shared="):
        read(batch(side=entry))
    shared = read(batch(side=entry), shared="side")
    assert all(one.content["side"] is entry for one in shared.singly())


def test_ranks_need_parts_of_their_own():
    """A sampler deals rows and repeats some of them, and documents cannot be recognised by the numbers of rows."""
    ranks = SimpleNamespace(count=2, rank=1)
    reader = Reader(packed=lambda content, number, is_shared: read(content))
    rows = [{key: value[n] for key, value in batch().items()} for n in (0, 1)] * 2
    loader = DataLoader(rows, 2, sampler=DistributedSampler(rows, num_replicas=2, rank=1, shuffle=False))
    with pytest.raises(ValueError, match=r"sampler deals rows to 2 ranks.*iter\(loader\)"):
        next(iter(Data(loader, reader, torch.device("cpu"), None, ranks)))
    data = Data(iter([batch(), batch()]), reader, torch.device("cpu"), 15, ranks)
    assert [one.places for one in data] == [range(1, 9, 2), range(9, 15, 2)]
    assert (data.examples, data.dropped) == (7, 2)


def test_labels_inside_documents():
    labels = inside_documents(IDS, batch())
    assert labels.tolist() == [[1, 2, -100, 4, -100, -100], [7, 8, 9, -100, 11, -100]]
    assert inside_documents(IDS, {"input_ids": IDS}) is IDS


@pytest.mark.parametrize("ndim", [3, 4])
def test_positions_of_several_kinds_and_masks_of_pairs_are_cut(ndim):
    kinds = torch.stack([POSITIONS, *torch.randint(9, (3, 2, 6))])
    examples = read(batch(position_ids=kinds, attention_mask=SCORES if ndim == 4 else SCORES[:, 0]))
    one = list(examples.singly())[2].content
    assert torch.equal(one["position_ids"], kinds[:, 1:, :4])
    assert torch.equal(one["attention_mask"].view(4, 4), SCORES[1, 0, :4, :4])
    assert torch.equal(examples.take(2, 4).content["position_ids"], kinds[:, 1:])


MASKS = {
    "bool": SAME,
    "two heads": SAME.expand(2, 2, 6, 6).clone(),
    "without heads": SAME[:, 0],
    "numpy": SAME.numpy(),
    "minus infinity": SCORES,
    "the least number": torch.zeros(2, 1, 6, 6).masked_fill(~SAME, torch.finfo(torch.float32).min),
    "integers": SAME.long(),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_of_pairs_must_separate_each_batch(mask):
    """One pair of positions of two documents, in one head, is enough; padding may see whatever it likes."""
    good = torch.as_tensor(MASKS[mask])
    as_given = numpy.asarray if mask == "numpy" else torch.as_tensor
    for row, query, key in ((1, 4, 3), (0, 0, 5)):  # another example, and a document without a label
        bad = good.clone()
        bad[(row, query, key) if bad.ndim == 3 else (row, -1, query, key)] = 1
        with pytest.raises(ValueError, match=f"batch 0 .* position {query} of row {row} attend to position {key}, "):
            read(batch(attention_mask=as_given(bad)))
    of_none = good.clone()
    of_none[0, ..., 5, :] = 1
    for fine in (good, of_none):
        assert read(batch(attention_mask=as_given(fine))).num_examples == 4


def test_forms_are_kinds():
    """By a mask of other axes or numbers a model may not keep apart what it keeps apart by the first one."""
    forms = [{}, {"attention_mask": SAME}, {"attention_mask": SCORES}, {"attention_mask": torch.ones_like(IDS)}]
    assert len({read(batch(**entries)).kind for entries in forms}) == 4
    assert read(batch(attention_mask=SAME)).kind == read(batch(attention_mask=SAME.clone())).kind


def test_what_begins_above_the_lowest_position_is_looked_at():
    """Flash attention does not see where such a document begins, and the lowest position may be in another one."""
    jumping = read(batch(position_ids=torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 7, 8]])))
    assert jumping.few.places == range(2, 4)
    assert jumping.few.documents.shape == (2, 6)
    assert jumping.kind == jumping.few.kind != read(batch()).kind
    one = {key: value[:1] for key, value in batch(position_ids=torch.tensor([[0, 1, 7, 8, 2, 3]] * 2)).items()}
    assert read(one).few.documents == Documents((1, 6), (Span(0, 0, 2), Span(0, 2, 4)))
    assert read(one).few.content["labels"].tolist() == [[1, 2, 3, 4, -100, -100]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_query_from_which_a_finite_number_hides_all_keys_sees_them_all(dtype):
    """The scores are lost in the rounding of the number, so that all get the same weight."""
    mask = torch.zeros(2, 1, 6, 6, dtype=dtype).masked_fill(~SAME, torch.finfo(dtype).min)
    assert read(batch(attention_mask=mask)).num_examples == 4
    mask[1, :, 2] = torch.finfo(dtype).min
    with pytest.raises(ValueError, match="position 2 of row 1 attend to position 4"):
        read(batch(attention_mask=mask))
    mask[1, :, 2] = -torch.inf  # of which sdpa makes zeros, and eager attention NaN
    assert read(batch(attention_mask=mask)).num_examples == 4
