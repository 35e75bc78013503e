"""The limit of many steps, against the accountant that promises are made by."""

from __future__ import annotations

import pytest

from fedlora.common.privacy.accountant import Mechanism, epsilon_of
from fedlora.common.privacy.central_limit import about_sigma, gaussian_mu


def test_mu_is_that_of_the_accountant() -> None:
    """ε of a Gaussian mechanism without sampling, by an accountant that knows nothing of μ."""
    for epsilon in (0.5, 2.0, 8.0):
        mu = gaussian_mu(epsilon, 1e-5)
        found = epsilon_of([Mechanism(1.0, 1 / mu, 1)], 1e-5)
        assert found == pytest.approx(epsilon, rel=0.02)


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 30), (0.2, 60), (0.05, 2_000)])
def test_so_much_noise_costs_about_what_was_asked(rate: float, steps: int) -> None:
    sigma = about_sigma(gaussian_mu(4.0, 1e-5), rate, steps)
    assert epsilon_of([Mechanism(rate, sigma, steps)], 1e-5) == pytest.approx(4.0, rel=0.25)
