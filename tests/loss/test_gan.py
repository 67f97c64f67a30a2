"""Both sides of the adversarial loss and LeCam, against hand values and the formulas."""

import copy

import pytest
import torch

from loss.gan import LeCam, discriminator_terms, generator_loss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def hinge(logits_real, logits_fake):
    """The only term."""
    (name, value), *others = discriminator_terms(logits_real, logits_fake).items()
    assert name == "hinge" and not others
    return value


def test_hinge_and_generator_hand_values():
    real, fake = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([-3.0, 0.0, 1.0, -0.5])
    # relu(1 - real) = 0, 0.5, 2, 0; relu(1 + fake) = 0, 1, 2, 0.5
    assert hinge(real, fake).item() == pytest.approx(0.5 * (2.5 / 4 + 3.5 / 4))
    assert generator_loss(fake).item() == pytest.approx(2.5 / 4)


def test_each_side_pushes_its_own_way():
    """Discriminator: real up, fake down, nothing beyond the margins. VAE: fake up, always."""
    real = torch.tensor([0.0, 2.0], requires_grad=True)
    fake = torch.tensor([0.0, -2.0], requires_grad=True)
    hinge(real, fake).backward()
    assert real.grad.tolist() == [-0.25, 0.0]
    assert fake.grad.tolist() == [0.25, 0.0]
    fake.grad = None
    generator_loss(fake).backward()
    assert fake.grad.tolist() == [-0.5, -0.5]


def test_real_and_fake_may_differ_in_number():
    assert hinge(torch.zeros(4, 1, 2, 2), torch.ones(2, 1, 2, 2)).item() == 1.5


def test_lecam_formula_and_moving_averages_over_three_batches():
    """mean relu(D(real) - a_fake)^2 + mean relu(a_real - D(fake))^2 with the averages of before."""
    lecam, a_real, a_fake = LeCam(decay=0.9), 0.0, 0.0
    for _ in range(3):
        real, fake = torch.randn(3, 1, 2, 2) + 1, torch.randn(3, 1, 2, 2) - 1
        r, f = real.flatten().tolist(), fake.flatten().tolist()
        expected = sum(max(v - a_fake, 0) ** 2 for v in r) / len(r)
        expected += sum(max(a_real - v, 0) ** 2 for v in f) / len(f)
        assert lecam(real, fake).item() == pytest.approx(expected, rel=1e-5)
        lecam.update(real.mean(), fake.mean())
        a_real = 0.9 * a_real + 0.1 * sum(r) / len(r)
        a_fake = 0.9 * a_fake + 0.1 * sum(f) / len(f)
        assert lecam.real.item() == pytest.approx(a_real, rel=1e-5)
        assert lecam.fake.item() == pytest.approx(a_fake, rel=1e-5)


def test_lecam_gradients_reach_the_logits_alone():
    lecam = LeCam(decay=0.5)
    lecam.real.fill_(1.0)
    lecam.fake.fill_(-1.0)
    real = torch.tensor([0.0, -2.0], requires_grad=True)
    fake = torch.tensor([0.5, 3.0], requires_grad=True)
    lecam(real, fake).backward()
    lecam.update(real.detach().mean(), fake.detach().mean())
    assert real.grad.tolist() == [1.0, 0.0]  # 2 (0 + 1) / 2
    assert fake.grad.tolist() == [-0.5, 0.0]  # -2 (1 - 0.5) / 2
    assert lecam.real.item() == 0.0 and not lecam.real.requires_grad


def test_lecam_averages_travel_with_the_state_dict():
    """A resumed run goes on with the averages it had."""
    one, other = LeCam(), LeCam()
    one.update(torch.randn(8).mean(), torch.randn(8).mean())
    assert set(one.state_dict()) == {"real", "fake"} and not list(one.parameters())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    real, fake = torch.randn(8), torch.randn(8)
    assert torch.equal(one(real, fake), other(real, fake))
    assert one.state_dict() == other.state_dict()
    assert LeCam().decay == 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_float32_losses(dtype):
    real, fake = torch.full((2,), 300.0, dtype=dtype), torch.full((2,), -300.0, dtype=dtype)
    losses = hinge(fake, real), generator_loss(fake), LeCam()(real, fake)
    assert [loss.item() for loss in losses] == [301.0, 300.0, 180_000.0]  # 300^2 overflows float16
    assert {loss.dtype for loss in losses} == {torch.float32}
