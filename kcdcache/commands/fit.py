"""`fit`: a teacher or a plain baseline, trained on hard labels."""

from kcdcache.commands import Result, inputs
from kcdcache.export.condensed_set import load_data
from kcdcache.progress import Progress
from kcdcache.settings import FitCommand
from kcdcache.training import fit, processes


def run(command: FitCommand, progress: Progress, dry_run: bool = False) -> Result:
    """Train a teacher or a baseline; return its summary, or with `dry_run` what would be trained."""
    data = load_data(command.data)
    settings = command.training.model_copy(update=inputs.usual_views(command.given, data))
    if dry_run:
        return {
            "would": "fit",
            "model": command.model,
            "samples": len(data.train),
            "steps": -(-len(data.train) // settings.batch_size) * settings.epochs,
            "out": str(command.out),
            **data.corrupted(),
        }
    with processes.group_of() as group:
        made = fit.run(
            settings,
            data=data,
            model=command.model,
            out=command.out,
            device=command.machine.device,
            threads=command.machine.threads,
            allow_env_change=command.machine.allow_env_change,
            group=group,
            progress=inputs.paced(progress, command.out),
        )
    return made.document()
