"""Effects of units from pairs: against Bayesian regression written out, and what no prediction may know."""

import pytest
import torch
from torch import Tensor

from offload_trainer.structure import effects as module
from offload_trainer.structure.effects import DOUBT, ENOUGH, FORGETS, JUDGED, LATELY, LEAST, NOISES, REMEMBERED, Effects

UNITS = 30


def shown(pairs: int, seed: int = 0) -> tuple[Effects, Tensor, Tensor, Tensor]:
    """Effects after so many pairs, the features, and the pairs: m − m′ (pairs, n) and d (pairs,)."""
    generator = torch.Generator().manual_seed(seed)
    effects, features = Effects(UNITS), torch.rand(2, UNITS, generator=generator)
    true = torch.randn(UNITS, generator=generator, dtype=torch.float64)
    differences, ds = [], []
    for _ in range(pairs):
        m, m2 = (torch.rand(UNITS, generator=generator) < 0.5 for _ in range(2))
        differences.append(m.double() - m2.double())
        ds.append(float(true @ differences[-1] + torch.randn((), generator=generator)))
        effects.compare(m, m2, ds[-1], effects.expected(features))
    return effects, features, torch.stack(differences), torch.tensor(ds, dtype=torch.float64)


def regression(features: Tensor, x: Tensor, d: Tensor, noise: float, counts: Tensor) -> Tensor:
    """Posterior mean of c in the space of units: (prior⁻¹ + xᵀ noise⁻¹ x)⁻¹ xᵀ noise⁻¹ d."""
    f = features.double()
    own = torch.diag(f[1] / f[1].mean() + LEAST)
    said = [torch.outer(one, one) / (x @ one).square().mean() for one in f]
    prior = own / torch.trace(x @ own @ x.T) * len(x) + sum(said)
    precision = counts / noise
    return torch.linalg.solve(prior.inverse() + (x.T * precision) @ x, x.T @ (precision * d))


def test_they_are_those_of_the_regression_that_predicts_left_out_pairs_best() -> None:
    effects, features, x, d = shown(20)
    x, d = x[:-1], d[:-1]
    ages = torch.arange(len(d) - 1, -1, -1, dtype=torch.float64)
    tried = []
    for forget in FORGETS:
        for noise in NOISES:
            counts, error = forget**ages, 0.0
            for i in range(len(d)):  # its weight goes to nothing: left out, with the scales of the prior as they were
                others = counts.clone()
                others[i] = 1e-12
                error += float(JUDGED ** ages[i] * (d[i] - regression(features, x, d, noise, others) @ x[i]) ** 2)
            tried.append((error, noise, counts))
    _, noise, counts = min(tried, key=lambda one: one[0])
    assert len({round(error, 6) for error, *_ in tried}) == len(FORGETS) * len(NOISES)
    torch.testing.assert_close(effects.expected(features), regression(features, x, d, noise, counts))


@pytest.mark.parametrize(("before", "least"), [(1.0, 0.85), (-1.0, 0.4)])
def test_what_older_pairs_have_shown_counts_as_long_as_it_holds(before: float, least: float) -> None:
    """Effects that stay, all 1, are learned from all pairs; effects that turn round from the last ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 3, generator=generator, dtype=torch.float64)
    d = x.sum(1) * torch.tensor([before] * 60 + [1.0] * 40, dtype=torch.float64)
    d += 0.5 * torch.randn(100, generator=generator, dtype=torch.float64)
    found = x.T @ module._fitted(x @ x.T, d)
    assert (found > least).all() and (found < 1.15).all()


def test_units_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    effects, features, *_ = shown(20)
    whole = effects.expected(features)
    monkeypatch.setattr(module, "CHUNK", 7)
    torch.testing.assert_close(effects.expected(features), whole)


def test_units_that_make_most_of_the_difference_are_found() -> None:
    """Among some to whose gates the loss reacts as strongly, by their mean c²."""
    generator = torch.Generator().manual_seed(1)
    effects, features = Effects(200), torch.rand(2, 200, generator=generator)
    features[1, 10:20] = 20
    for _ in range(40):
        m, m2 = (torch.rand(200, generator=generator) < 0.5 for _ in range(2))
        d = -3.0 * (float(m[17]) - float(m2[17])) + 0.1 * float(torch.randn((), generator=generator))
        effects.compare(m, m2, d, effects.expected(features))
    found = effects.expected(features)
    assert int(found.abs().argmax()) == 17 and -3.5 < float(found[17]) < -1.5
    assert effects.trust() > 0.8


def test_the_last_pair_says_nothing_yet() -> None:
    """One of its masks may be in the pair that is asked about."""
    answers = []
    for last in (0.3, -50.0):
        effects, features, *_ = shown(20)
        m = torch.arange(UNITS) < 10
        effects.compare(m, ~m, last, effects.expected(features))
        answers.append((effects.expected(features), effects.trust()))
    assert torch.equal(answers[0][0], answers[1][0]) and answers[0][1] == answers[1][1]


def test_trust_is_the_factor_by_which_predictions_would_have_been_best() -> None:
    effects = Effects(1)
    m, none = torch.tensor([True]), torch.tensor([False])
    assert effects.trust() == 0
    predicted, ds = torch.linspace(1, 2, 30, dtype=torch.float64), torch.linspace(0.7, 0.4, 30, dtype=torch.float64)
    for p, d in zip(predicted, ds, strict=True):
        effects.compare(m, none, float(d), p[None])
    effects.compare(m, none, 9.0, predicted[:1])  # the last one
    counts = LATELY ** torch.arange(29, -1, -1, dtype=torch.float64)
    root = counts.sqrt()
    best = torch.linalg.lstsq((root * predicted)[:, None], (root * ds)[:, None]).solution.item()
    assert effects.trust() == pytest.approx(best / (1 + DOUBT / float(counts.sum())))
    for _ in range(40):
        effects.compare(m, none, -1.0, torch.ones(1, dtype=torch.float64))
    assert effects.trust() == 0  # worse than none


def test_nothing_is_expected_of_few_pairs_and_old_ones_are_forgotten() -> None:
    effects, features, *_ = shown(ENOUGH)
    assert not effects.expected(features).any()
    effects, features, *_ = shown(ENOUGH + 1)
    assert effects.expected(features).any()
    most, m = REMEMBERED[1], torch.arange(UNITS) < 10
    for i in range(most + 50):
        effects.compare(m.roll(i), m, 0.1 * (i % 7), torch.zeros(UNITS, dtype=torch.float64))
    state = effects.state_dict()
    assert state["differences"].shape == (most + 1, UNITS) and int(state["count"]) == most + 1
    other = Effects(UNITS)
    other.load_state_dict(state)
    assert torch.equal(other.expected(features), effects.expected(features)) and other.trust() == effects.trust()


def test_units_that_never_differ_have_no_effect_that_is_not_a_number() -> None:
    effects, features = Effects(UNITS), torch.zeros(2, UNITS)
    m = torch.ones(UNITS, dtype=torch.bool)
    for i in range(20):
        effects.compare(m, m, 0.1 * (-1) ** i, effects.expected(features))
    assert not effects.expected(features).any() and effects.trust() == 0


def test_the_more_units_the_fewer_pairs_are_remembered() -> None:
    least, most = REMEMBERED
    rooms = [len(Effects(units).state_dict()["differences"]) - 1 for units in (1, 1000, 60_000, 10**6)]
    assert rooms == sorted(rooms, reverse=True) and rooms[0] == most > rooms[2] > rooms[3] == least
    assert len(Effects(1000, remembers=False).state_dict()["differences"]) == 0
