import pytest

from megalm.config.schema import Config, Data, Engine, Model, Optim, Run, Train
from megalm.training.callbacks.base import RunContext, StepMetrics, ValidationMetrics


@pytest.fixture
def config():
    return Config(
        run=Run(name="try1"),
        model=Model(num_layers=2, hidden_size=32, num_heads=2, vocab_size=300, sequence_length=64),
        data=Data(path=("data/quickstart",)),
        optim=Optim(lr=1e-3),
        train=Train(steps=100, micro_batch_size=2, global_batch_size=8),
        engine=Engine(dtype="fp32"),
    )


@pytest.fixture
def make_context(config, tmp_path):
    def make(**changes):
        values = {
            "config": config,
            "run_dir": tmp_path,
            "start_step": 0,
            "total_steps": config.train.steps,
            "topology": "tp2·pp2 (4 ranks)",
            "device": "CPU",
            "parameters": 1_463_296,
        }
        return RunContext(**(values | changes))

    return make


@pytest.fixture
def make_step():
    return step_metrics


@pytest.fixture
def make_validation():
    return validation_metrics


def step_metrics(step, **changes):
    values = {
        "step": step,
        "samples": 8 * step,
        "tokens": 512 * step,
        "loss": 1 / 3 + 5 / step,
        "loss_units": 500,
        "grad_norm": 0.1 + 0.2,
        "lr": 1e-3,
        "loss_scale": None,
        "step_seconds": 0.25,
        "tokens_per_second": 2048.0,
        "mfu": None,
        "data_seconds": 0.001,
        "bubble_fraction": 0.2,
        "memory_gib": 0.5,
    }
    return StepMetrics(**(values | changes))


def validation_metrics(step, val_loss=2.0, val_perplexity=7.389):
    return ValidationMetrics(
        step=step,
        samples=8 * step,
        tokens=512 * step,
        scores={
            "val_loss": val_loss,
            "val_perplexity": val_perplexity,
            "val_accuracy": 0.25,
            "val_commonest": 0.05,
            "val_tokens": 1000,
        },
    )
