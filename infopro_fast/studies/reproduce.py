"""`infopro-fast reproduce`: train the runs that a table lacks, then write the table and its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from infopro_fast import errors
from infopro_fast.info import provenance
from infopro_fast.whole_files import replace_file

from . import figures, known, results, runner, summary, tables


def reproduce(study: tables.Study) -> list[Path]:
    """Return the paths of the table (Markdown, JSON) and its figures. Finished runs stay, stopped runs
    continue.

    Before any training: raises ConfigError for impossible settings, StudyError for a known table with other
    settings. Later: raises StudyError if runs failed, after the table of the others was written, or if no run
    is finished.
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
    """Write the table as Markdown and JSON, and the figures; return the paths."""
    study.out.mkdir(parents=True, exist_ok=True)
    paths = [study.out / f"{study.table}.{kind}" for kind in ("md", "json")]
    where = {**provenance(), "jobs": study.jobs, "threads": study.threads}
    rows = [
        {"method": r.cell.method, "modules": r.cell.modules, "weights": r.cell.weights,
         "settings": known.settings_of_a_cell(study, r.cell),
         "seeds": r.seeds, "errors": r.errors,
         "cross_entropies": r.cross_entropies, "curves": r.curves, "cost": r.cost, "paper": r.paper,
         "paper_memory_gb": tables.published_memory(study, r.cell)}
        for r in found
    ]
    settings = json.loads(tables.jobs(study)[0].config.resolved().to_json())
    for name in ("out", "data_root", "seed"):  # folders belong to a machine, the seed to a run
        del settings[name]
    about = {"table": study.table, "scale": study.scale, "settings": settings, "where": where}
    content = {**about, "known": there.sources, "cells": rows, "compared": results.compare(found)}
    replace_file(paths[0], summary.markdown(study, found).encode())
    replace_file(paths[1], (json.dumps(content, indent=1) + "\n").encode())
    return paths + figures.draw(study, found)
