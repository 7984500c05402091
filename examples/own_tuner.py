"""Every piece alone, inside a `tune.Tuner` of your own: `python examples/own_tuner.py [trials] [steps]`.

The trainable, the space as Ray domains, the searcher that knows about pruning, the baseline and the MLflow callback come from
tune_ssim; the Tuner, the loop and the choice of the winner are yours.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ray import tune

from tune_ssim import load_space, make_trainable
from tune_ssim.guards import NonFinite, NormRatio, SmokeTest
from tune_ssim.orchestration import BaselineFirst, GuardedOptunaSearch, MLflowTracking, param_space


def main(trials: int = 4, steps: int = 60, storage: Path | None = None) -> None:
    storage = (storage or Path("own_tuner_results")).absolute()
    trainable = make_trainable(
        "tune_ssim.tasks.fundus_sr:FundusSR",
        guards=[NormRatio(limit=10), SmokeTest(at=(0, 25, 50)), NonFinite()],
        task_config={"preset": "sgd", "steps": steps},
        steps=steps,
    )
    space = param_space(load_space("wide"))  # plain Ray domains: any Ray searcher takes them
    searcher = BaselineFirst(
        GuardedOptunaSearch(metric="delta_ssim", mode="max", seed=0, concurrency=2),
        # A baseline sets every key that the space searches, so that none stays a Ray domain.
        {"gain": 0.0, "ssim_loss_max_t": 0.3, "pixel_loss_weight": 0.05},
        folder=storage / "baseline",
        seeds=[0, 1],
    )
    results = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(search_alg=searcher, num_samples=trials + 2, max_concurrent_trials=2, reuse_actors=True),
        run_config=tune.RunConfig(name="own_tuner", storage_path=str(storage), callbacks=[MLflowTracking()], verbose=0),
    ).fit()
    for result in results:
        metrics = result.metrics or {}
        print(f"{metrics.get('verdict', '?'):10} {metrics.get('delta_ssim', float('nan')):+.4f}  {metrics.get('reason')}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:3]))
