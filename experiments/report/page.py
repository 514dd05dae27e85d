"""Puts the parts of a run's page together and writes it, with --watch until the run ends."""

import time
from pathlib import Path
from typing import NamedTuple

from experiments.report.films import Films, flow_section, queries_section
from experiments.report.prototypes import prototypes_section
from experiments.report.results import confusion_section, of_another_run, read_results, tables
from experiments.report.training import charts, facts, state
from experiments.result_files import read_log
from support.cli import say
from support.files import check_folder, check_writable
from support.page import Section, write_page

RELOAD_S = 60  # between two reloads of a page, where --watch says nothing else


class Parts(NamedTuple):
    """What of a page stays as it is while a run goes on."""

    tables: str
    sections: list
    films: Films
    faults: list  # what can't be shown


def read_parts(s, settings):
    """Read results, films, flow and prototypes. Raises BadInput where a result is none, or of something else."""
    results = read_results(s.json, s.split, settings)
    films, folder = Films(settings.get("videos")), Path(s.out) / "previews"
    check_folder(folder, "--out")
    queries, asked = queries_section(results, films)
    flow, no_flow = flow_section(settings, asked, films, folder)
    prototypes, no_prototypes = prototypes_section(settings["prototypes"])
    unreadable = films.make_previews(folder)
    faults = [*filter(None, [of_another_run(results)]), *no_flow, *no_prototypes, *unreadable]
    return Parts(tables(results), [*queries, *confusion_section(results), *prototypes, *flow], films, faults)


def write(s, log, parts):
    """Write the page of a log as it is now -> whether the run goes on."""
    said, goes_on = state(log, time.time())
    own = Section("Run", f'<div class="columns"><div>{facts(log)}</div><div>{parts.tables}</div></div>{charts(log)}')
    write_page(s.out, title=f"Run {s.run}", items=parts.films.items, sections=[own, *parts.sections],
               notes=[f"{log.settings['method']} on {log.settings['dataset']}, {said}", *parts.faults],
               reload_s=(s.watch or RELOAD_S) if goes_on else None)
    return goes_on


def report(s):
    """Write a run's page, with --watch again and again -> exit status."""
    log = read_log(s.run)
    check_writable(Path(s.out) / "index.html", "--out")
    parts = read_parts(s, log.settings)
    for fault in parts.faults:
        say(fault)
    while write(s, log, parts) and s.watch:
        time.sleep(s.watch)
        log = read_log(s.run)
    films = len(parts.films.items)
    say(f"{Path(s.out) / 'index.html'}: {len(log.steps)} lines of the log, {len(s.json)} results, {films} films, "
        f"{sum(bool(item.missing) for item in parts.films.items)} of them not readable")
    return 0
