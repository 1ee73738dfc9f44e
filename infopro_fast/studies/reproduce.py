"""`infopro-fast reproduce`: train what a table needs and is not there yet, then write the table and its figures."""

from __future__ import annotations

from pathlib import Path

from infopro_fast import errors

from . import known, runner, summary, tables


def reproduce(study: tables.Study) -> list[Path]:
    """Paths of the table (Markdown, JSON) and the figures. Resumable: what is finished stays, what was begun goes on.

    Raises ConfigError for settings that cannot be trained, before anything is, and `errors.StudyError` for a known table that is of other
    settings; later StudyError if runs failed, after the table of the others was written, or if there is no run to write about.
    """
    there, failure = known.read(study), None
    jobs = [job for job in tables.jobs(study) if (job.cell, job.seed) not in there.runs]
    if study.train:
        try:
            runner.run_all(jobs, study.jobs)
        except errors.StudyError as error:
            failure = error
    results = summary.collect(study, there)
    paths = summary.write(study, results, there) if results else []
    if failure is not None:
        raise failure
    if not results:
        raise errors.StudyError(f"{study.out}: no run of {study.table} at scale {study.scale} is finished")
    return paths
