"""The images of a step: mirrored where drawn, split into micro-batches, in the memory asked for."""

import torch

from utils.training.batch import make_batch, to_device
from utils.training.draws import draw


def drawn(num, hflip):
    return draw((num, 4, 2, 2), seed=0, step=0, hflip=hflip)


def test_without_hflip_no_image_is_copied():
    x, y, draws = torch.randn(8, 3, 4, 4), torch.zeros(8, dtype=torch.long), drawn(8, hflip=False)
    assert make_batch(x, y, draws, (), hflip=False).x is x


def test_images_and_cached_rows_are_mirrored_where_drawn():
    x, y, draws = torch.randn(16, 3, 4, 4), torch.zeros(16, dtype=torch.long), drawn(16, hflip=True)
    cached = (torch.randn(16, 2, 2, 4, 2, 2).half(), torch.randn(16, 2, 5, 6).half())
    batch = make_batch(x, y, draws, cached, hflip=True)
    assert draws.flip.any() and not draws.flip.all()
    for i, flip in enumerate(draws.flip.tolist()):
        assert torch.equal(batch.x[i], x[i].flip(-1) if flip else x[i])
        assert torch.equal(batch.posterior[i], cached[0][i, int(flip)].float())
        assert torch.equal(batch.feats[0][i], cached[1][i, int(flip)].float())


def test_micro_batches_join_to_the_batch():
    x, y, draws = torch.randn(8, 3, 4, 4), torch.arange(8), drawn(8, hflip=False)
    cached = (torch.randn(8, 1, 2, 4, 2, 2).half(), torch.randn(8, 1, 5, 6).half())
    batch = make_batch(x, y, draws, cached, hflip=False)
    parts = batch.split(4)
    assert [len(part.y) for part in parts] == [2, 2, 2, 2]
    assert torch.equal(torch.cat([part.x for part in parts]), x)
    assert torch.equal(torch.cat([part.posterior for part in parts]), batch.posterior)
    assert torch.equal(torch.cat([part.feats[0] for part in parts]), batch.feats[0])
    bare = make_batch(x, y, draws, (), hflip=False).split(2)
    assert all(part.posterior is None and not part.feats for part in bare)


def test_rows_come_as_nhwc_memory_and_leave_it_only_when_asked():
    rows = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.zeros(4, dtype=torch.long)
    kept, _, _ = to_device([rows, labels], torch.device("cpu"), channels_last=True)
    plain, _, _ = to_device([rows, labels], torch.device("cpu"), channels_last=False)
    assert kept.is_contiguous(memory_format=torch.channels_last) and plain.is_contiguous()
    assert torch.equal(kept, plain)
