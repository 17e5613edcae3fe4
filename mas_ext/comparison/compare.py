"""Methods compared in Python, on a scenario and a network of one's own, with all that `mas-ext run` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mas_ext._arguments import hint
from mas_ext.comparison import sweep
from mas_ext.comparison.options import OPTIONS, Config
from mas_ext.comparison.results import Findings
from mas_ext.methods.quadratic import Lam
from mas_ext.models import MakeModel
from mas_ext.scenarios import Scenario


def compare(
    scenario: Scenario | Callable[[int], Scenario] | str,
    make_model: MakeModel | str = "mlp",
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("finetune", "mas", "joint"),
    seeds: int = 3,
    lam: Lam | Sequence[float] = "auto",
    *,
    out: str | Path,
    resume: bool = False,
    **options: Any,
) -> Findings:
    """Learn a scenario with every method and seed, with progress on stderr, and keep all that is found.

        found = mas_ext.compare(scenario, models.cnn, ["finetune", "mas"], out="runs/first")
        print(found)

    It is what `mas-ext run` does: `mas-ext report` makes a page of the directory, and a comparison that was
    stopped, even killed, goes on to the same bits. That it is the same is told by names and settings: what a
    function of this name does must not have changed.

    Args:
        scenario: the tasks; or a function seed -> Scenario, where they depend on the seed; or a name.
        make_model: from the shape of one input to a new MultiHead, with the random state of the seed, as of all
            methods; or a name. `mas_ext.models.with_heads` makes one of any network.
        methods: names, or options by name, {"mas": {"lam": 0.1}}; a method of one's own gets a name by
            `mas_ext.methods.register`.
        seeds: how many times everything is learned, with the seeds 0, 1, ...
        lam: strength of all methods that have one. Of several, each method takes the best on validation data,
            with seeds that are not counted; "auto": chosen for every task after the first, from its data alone,
            by all methods that can; an empty list: each method's own.
        out: a new directory.
        resume: go on with the comparison in `out`.
        options: of training, as those of Trainer, such as setting="class", epochs=10 or a task_loss; and, as
            those of `mas-ext run`: device, lam_seeds; data, tasks and order of a scenario by name; hidden.

    Returns:
        What was found; printed, it is the table. `learned["mas"][seed].accuracy` is a matrix accuracy[t, k].

    Raises:
        TypeError: an option that does not exist.
        ValueError: something that can't be used, found before any training.
        FileExistsError: `out` exists, and is not to be resumed.
        FileNotFoundError: there is nothing to resume; data are missing.
        KeyboardInterrupt: Ctrl-C; what was learned is kept.
    """
    known = OPTIONS.keys() - {"model"}
    for name in options:
        if name not in known:
            raise TypeError(f"options: got {name!r}, {hint(name, sorted(known))}")
    named = {"scenario": scenario, "model": make_model, "methods": methods}
    config = Config.read({**named, "seeds": seeds, "lam": lam, **options})
    sweep.run(config, out, resume=resume)
    return Findings.read(out)
