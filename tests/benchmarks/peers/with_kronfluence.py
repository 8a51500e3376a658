"""kronfluence: pairwise scores with the identity in place of the curvature.

`has_shared_parameters` is its documented switch for a module that is called more than once; off is
its default.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import cases
from cases import Case
from judge import Way, drive
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

REFUSALS = ("set 'has_shared_parameters=True'",)


class SquareLoss(Task):
    """The sum over rows of the loss, for training rows and queries alike."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """One number."""
        return cases.row_losses(model(batch[0]), batch[1]).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """One number."""
        return self.compute_train_loss(batch, model)


class PerSample(SquareLoss):
    """Post-processes per-sample gradients, without changing them.

    The option is for other purposes, but switches to code that adds up the calls of a module.
    """

    enable_post_process_per_sample_gradient = True

    def post_process_per_sample_gradient(self, module_name: str, gradient: Tensor) -> Tensor:
        """The gradient as it is."""
        return gradient


def scores(shared: bool, task: Task) -> Callable[[Case], Tensor]:
    """`compute_pairwise_scores` with strategy "identity": (N, Q)."""

    def run(case: Case) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                "peers", prepare_model(case.make(), task), task, cpu=True, output_dir=folder
            )
            train, query = TensorDataset(*case.train), TensorDataset(*case.query)
            factors = FactorArguments(strategy="identity", has_shared_parameters=shared)
            analyzer.fit_all_factors("identity", train, len(train), factor_args=factors)
            analyzer.compute_pairwise_scores(
                "scores",
                "identity",
                query,
                train,
                per_device_query_batch_size=len(query),
                per_device_train_batch_size=len(train),
                score_args=ScoreArguments(),
            )
            found = analyzer.load_pairwise_scores("scores")
        return found["all_modules"].T

    return run


if __name__ == "__main__":
    drive(
        [
            Way("pairwise scores", scores(False, SquareLoss()), refusals=REFUSALS),
            Way(
                "pairwise scores, has_shared_parameters=True",
                scores(True, SquareLoss()),
                refusals=REFUSALS,
            ),
            Way(
                "the same, with post_process_per_sample_gradient",
                scores(True, PerSample()),
                refusals=REFUSALS,
            ),
        ],
        [cases.control(), cases.looped(), cases.rescaled()],
        ["kronfluence"],
    )
