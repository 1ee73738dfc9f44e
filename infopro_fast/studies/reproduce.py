"""`infopro-fast reproduce`: train what a table needs and is not there yet, then write the table and its figures."""

from __future__ import annotations

from pathlib import Path

from . import runner, summary, tables


def reproduce(study: tables.Study) -> list[Path]:
    """Paths of the table (Markdown, JSON) and the figures. Resumable: what is finished stays, what was begun goes on.

    Raises ConfigError for settings that cannot be trained, before anything is; `runner.StudyError` if runs failed, after the table of the
    others was written, or if there is no run to write about.
    """
    jobs, failure = tables.jobs(study), None
    if study.train:
        try:
            runner.run_all(jobs, study.jobs)
        except runner.StudyError as error:
            failure = error
    results = summary.collect(study)
    paths = summary.write(study, results) if results else []
    if failure is not None:
        raise failure
    if not results:
        raise runner.StudyError(f"{study.out}: no run of {study.table} at scale {study.scale} is finished")
    return paths
