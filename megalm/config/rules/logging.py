"""Rules about loggers: what Weights & Biases takes as names."""

from __future__ import annotations

from collections.abc import Iterator

from megalm.config.job import Job, Rule
from megalm.config.violation import Violation, spoken_list

_LONGEST_TAG = 64
_LONGEST_PROJECT = 128
_NOT_IN_PROJECTS = "/\\#?%:"


def wandb_takes_the_tags(job: Job) -> Iterator[Violation]:
    """W&B takes tags of up to 64 characters, each once; it would refuse the run otherwise."""
    tags = job.config.logging.wandb_tags or ()
    if long := [tag for tag in tags if len(tag) > _LONGEST_TAG]:
        wrong = f"{len(long[0])} characters in a tag"
        yield Violation("logging.wandb_tags", list(tags), wrong, f"at most {_LONGEST_TAG} in each")
    elif len(set(tags)) < len(tags):
        twice = spoken_list(sorted({tag for tag in tags if tags.count(tag) > 1}), "and")
        yield Violation("logging.wandb_tags", list(tags), f"{twice} is there twice", "each tag once")


def wandb_takes_the_project(job: Job) -> Iterator[Violation]:
    """W&B has projects whose name is part of an address."""
    project = job.config.logging.wandb_project
    if found := [sign for sign in _NOT_IN_PROJECTS if sign in project]:
        wrong = f"W&B takes no {' '.join(found)} in a project's name"
    elif len(project) > _LONGEST_PROJECT:
        wrong = f"{len(project)} characters"
    else:
        return
    right = f"a name of at most {_LONGEST_PROJECT} characters; the team is logging.wandb_entity"
    yield Violation("logging.wandb_project", project, wrong, right)


RULES: tuple[Rule, ...] = (wandb_takes_the_tags, wandb_takes_the_project)
