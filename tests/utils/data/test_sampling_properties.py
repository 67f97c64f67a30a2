"""Properties of the index sampler for any number of images, batch, seed and ranks."""

from hypothesis import given
from hypothesis import strategies as st

from utils.data.sampling import StepSampler, step_indices


@st.composite
def batches(draw) -> tuple[int, int, int, int]:
    """(images, global batch, ranks, seed) that go together."""
    world = draw(st.integers(1, 8))
    batch = world * draw(st.integers(1, 8))
    return draw(st.integers(batch, 300)), batch, world, draw(st.integers(0, 2**40))


@given(batches(), st.integers(0, 50))
def test_an_epoch_is_a_permutation_without_repetition(case, epoch):
    num, batch, _, seed = case
    steps = num // batch
    seen = [
        i
        for step in range(epoch * steps, (epoch + 1) * steps)
        for i in step_indices(num, batch, seed, step).tolist()
    ]
    assert len(seen) == len(set(seen)) == steps * batch and set(seen) <= set(range(num))


@given(batches(), st.integers(0, 500), st.integers(1, 5))
def test_ranks_share_a_step_and_their_number_does_not_change_it(case, start, count):
    num, batch, world, seed = case
    end = start + count
    ranks = [
        list(
            StepSampler(num, batch, seed=seed, rank=r, world=world, start_step=start, end_step=end)
        )
        for r in range(world)
    ]
    for k in range(count):
        shares = [rank[k] for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        together = [i for share in shares for i in share]
        assert together == step_indices(num, batch, seed, start + k).tolist()


@given(batches(), st.integers(0, 500), st.sets(st.integers(0, 20)))
def test_what_a_step_holds_does_not_depend_on_where_a_run_starts(case, start, skipped):
    num, batch, _, seed = case
    left_out = frozenset(start + k for k in skipped)
    sampler = StepSampler(
        num, batch, seed=seed, start_step=start, end_step=start + 10, left_out=left_out
    )
    kept = [step for step in range(start, start + 10) if step not in left_out]
    assert len(sampler) == len(kept)
    assert list(sampler) == [step_indices(num, batch, seed, step).tolist() for step in kept]
