"""`tlcli report`."""

from tlcli.cli.options import command
from tlcli.cli.output import Output
from tlcli.config.commands import ReportConfig
from tlcli.warned import warn


@command(ReportConfig, examples=("tlcli report runs/pets", "tlcli report runs/pets --worst 60 -o pets.html"))
def report(out: Output, config: ReportConfig) -> None:
    """Write one self-contained HTML page about a run: curves, confusion, calibration, mistakes."""
    from tlcli.commands import report as library

    written = library.report(config)
    path = str(written.report_path)
    document = {
        "report_path": path,
        "num_bytes": written.num_bytes,
        "splits": list(written.splits),
        "num_mistakes": written.num_mistakes,
        "num_thumbnails": written.num_thumbnails,
    }
    if written.num_thumbnails < written.num_mistakes:
        missing = written.num_mistakes - written.num_thumbnails
        text = f"{missing} of {written.num_mistakes} mistakes are shown without their image: it is gone."
        warn("thumbnails_missing", text)
    out.result("report", document, f"{path}  ({written.num_bytes / 1000:,.0f} kB)")
