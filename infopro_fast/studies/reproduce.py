"""`infopro-fast reproduce`: train what a table needs and is not there yet, then write the table and its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from infopro_fast import errors
from infopro_fast.info import provenance
from infopro_fast.whole_files import replace_file

from . import figures, known, results, runner, summary, tables


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
    found = results.collect(study, there)
    paths = write(study, found, there) if found else []
    if failure is not None:
        raise failure
    if not found:
        raise errors.StudyError(f"{study.out}: no run of {study.table} at scale {study.scale} is finished")
    return paths


def write(study: tables.Study, found: Sequence[results.Result], there: known.Known) -> list[Path]:
    """The table as Markdown and JSON, each whole or not at all, and the figures; returns the paths."""
    study.out.mkdir(parents=True, exist_ok=True)
    paths = [study.out / f"{study.table}.{kind}" for kind in ("md", "json")]
    where = {**provenance(), "jobs": study.jobs, "threads": study.threads}
    rows = [
        {"method": r.cell.method, "modules": r.cell.modules, "weights": r.cell.weights,
         "settings": known.settings_of_a_cell(tables.config(study, r.cell, study.first_seed)), "seeds": r.seeds, "errors": r.errors,
         "cross_entropies": r.cross_entropies, "curves": r.curves, "cost": r.cost, "paper": r.paper,
         "paper_memory_gb": tables.published_memory(study, r.cell)}
        for r in found
    ]  # fmt: skip
    settings = json.loads(tables.jobs(study)[0].config.resolved().to_json())
    for name in ("out", "data_root", "seed"):  # not of the study: folders of a machine, what a run is told apart by
        del settings[name]
    about = {"table": study.table, "scale": study.scale, "settings": settings, "where": where}
    content = {**about, "known": there.sources, "cells": rows, "compared": results.compare(found)}
    replace_file(paths[0], summary.markdown(study, found).encode())
    replace_file(paths[1], (json.dumps(content, indent=1) + "\n").encode())
    return paths + figures.draw(study, found)
