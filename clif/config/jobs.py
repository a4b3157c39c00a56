"""Section of the configuration about training jobs and feedback that arrive while the run lasts. Free of torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from clif.config.base import NotNegativeFloat, Positive, PositiveFloat, Section

Weight = Annotated[float, Field(ge=0.001, le=1000)]


class JobsConfig(Section):
    max_jobs: Annotated[int, Field(gt=0, le=10_000)] = 64
    """[jobs] Jobs that have not ended, at most; their samples are in the memory of the replicas."""
    max_files: Positive = 1000
    """[files] Uploaded files that are kept, at most, of all clients."""
    max_jobs_per_key: Positive = 8
    """[jobs] Of these, at most so many of one key. This and what follows of a key does not bind admins."""
    max_files_per_key: Positive = 100
    """[files] Files of one key that are kept, at most."""
    max_adapters_per_key: Positive = 1
    """[adapters] Adapters of their own that jobs of one key may have, at most: each takes one of
    `adapter.serving_slots`."""
    max_files_gib: PositiveFloat = 64.0
    """[GiB] All files that are kept, as uploaded, at most. Their tokens lie beside them and take about as much."""
    min_free_gib: NotNegativeFloat = 1.0
    """[GiB] What uploads leave free on the disk of the run's folder: others write there that cannot wait for room."""
    max_rows: Positive = 100_000
    """[rows] Longest file."""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """[share] Of a job without a validation file: this share of its different prompts, one at least, is held out and
    decides which of its versions are promoted."""
    own_weight: Weight = 1.0
    """Share of the rounds of `data.path` against that of a job, whose weight is 1 unless it says otherwise: rounds are
    shared by trained tokens / weight."""
    allow_feedback: bool = False
    """Whether clients may send better answers, which become training samples of adapter `clif`."""
    feedback_rows: Positive = 32
    """[rows] So many rows of feedback become a job."""
    feedback_wait_s: NotNegativeFloat = 60.0
    """Fewer rows become a job once the first of them has waited for so long."""
    feedback_epochs: Annotated[int, Field(gt=0, le=1000)] = 2
    """[epochs] How often such a job trains on each row."""
    max_feedback: Positive = 10_000
    """[rows] Rows that wait for a job, at most; further ones are refused."""
    feedback_quota: Positive = 1000
    """[rows] Of each key in a day."""
    feedback_answers: Positive = 1000
    """[answers] The last so many answers are kept in memory, so that feedback can name one by its id."""
    feedback_ttl_s: PositiveFloat = 3600.0
    """An answer is kept for so long."""
