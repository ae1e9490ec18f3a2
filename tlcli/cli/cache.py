"""`tlcli cache list|show|verify|prune`."""

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tlcli.cli.options import command
from tlcli.cli.output import Output, table
from tlcli.config.commands import CacheListConfig, CachePruneConfig, CacheShowConfig, CacheVerifyConfig
from tlcli.errors import CheckFailed, StorageError, UsageError
from tlcli.machine import paths

if TYPE_CHECKING:
    from rich.table import Table

    from tlcli.cache.prune import PruneItem
    from tlcli.cache.store import Summary

SHORT = 12
EMPTY = "The feature cache is empty."


@command(CacheListConfig, examples=("tlcli cache list", "tlcli cache list --json"))
def list_entries(out: Output, _config: CacheListConfig) -> None:
    """List the entries of the feature cache, last used first."""
    from tlcli.cache.store import Store
    from tlcli.wording import size_text

    store = Store(paths.features_dir())
    entries = store.entries()
    documents = [_document(entry) for entry in entries]
    total = sum(entry.num_bytes for entry in entries)
    document = {"path": str(store.root), "bytes": total, "entries": documents}
    if not entries:
        out.result("cache.list", document, EMPTY)
        out.hint("tlcli extract DATA --backbone B")
        return
    rows = [
        (
            entry.key[:SHORT], fact["backbone"] or entry.problem, fact["cut"], fact["row"], entry.num_rows,
            len(entry.shards), size_text(entry.num_bytes), _ago(entry.last_used),
        )
        for entry, fact in zip(entries, documents, strict=True)
    ]  # fmt: skip
    columns = ["key", "backbone", "cut", "row", "rows", "shards", "size", "last used"]
    footer = (
        f"\n{len(entries)} {'entry' if len(entries) == 1 else 'entries'}, {size_text(total)} in {store.root}"
    )
    out.result("cache.list", document, table(columns, rows), footer)
    out.hint(f"tlcli cache show {entries[0].key[:SHORT]}")


@command(CacheShowConfig, examples=("tlcli cache show 3fa4c1", "tlcli cache show 3fa4c1 --json"))
def show(out: Output, config: CacheShowConfig) -> None:
    """Show one entry: the facts its key is made of, its shards and what wrote them."""
    import json

    from tlcli.cache.key import flatten
    from tlcli.cache.store import Store
    from tlcli.machine.files import list_folder
    from tlcli.wording import size_text

    if config.key is None:
        raise UsageError("KEY is missing.", hint="See `tlcli cache list`, then `tlcli cache show KEY`.")
    entry = Store(paths.features_dir()).find(config.key)
    num_rows = len(entry.rows())
    shards = [
        {
            "name": shard.path.name,
            "rows": len(shard.keys),
            "bytes": shard.num_bytes,
            "env": json.loads(shard.env),
        }
        for shard in entry.shards()
    ]
    quarantined = [item.name for item in list_folder(entry.quarantine_dir) if not item.name.endswith(".txt")]
    document = {
        "key": entry.key, "path": str(entry.directory), "spec": entry.spec, "rows": num_rows,
        "shards": shards, "damaged": [damage.shard for damage in entry.damage], "quarantined": quarantined,
    }  # fmt: skip
    lines = [(name, value.strip('"')) for name, value in flatten(entry.spec).items()]
    written = [
        (
            item["name"],
            item["rows"],
            size_text(item["bytes"]),
            ", ".join(f"{k} {v}" for k, v in item["env"].items()),
        )
        for item in shards
    ]
    texts: list[Table | str] = [
        f"entry {entry.key}",
        f"in    {entry.directory}\n",
        table(["fact", "value"], sorted(lines)),
        "",
    ]
    texts += [table(["shard", "rows", "size", "written with"], written)]
    if document["damaged"] or quarantined:
        texts.append(f"\n{len(entry.damage)} damaged shards, {len(quarantined)} in quarantine")
        out.hint(f"tlcli cache verify {entry.key[:SHORT]}")
    out.result("cache.show", document, *texts)


@command(CacheVerifyConfig, examples=("tlcli cache verify", "tlcli cache verify 3fa4c1 --deep"))
def verify(out: Output, config: CacheVerifyConfig) -> None:
    """Check every cached row against its checksum; damaged shards go to quarantine and the exit code is 6."""
    from tlcli.cache.store import Store

    store = Store(paths.features_dir())
    keys = store.all_keys() if config.key is None else [store.find(config.key).key]
    documents = []
    for key in keys:
        found: dict[str, Any] = {"key": key, "rows": 0, "problem": None, "damaged": []}
        try:
            entry = store.find(key, repair=True)
            damage = entry.verify(deep=config.deep, progress=out.progress)
        except (StorageError, UsageError) as error:
            found["problem"] = error.message
        else:
            found["rows"] = len(entry.rows())
            found["damaged"] = [
                {"shard": item.shard, "reason": item.reason, "rows_lost": item.rows_lost} for item in damage
            ]
        documents.append(found)
    bad = [item for item in documents if item["problem"] or item["damaged"]]
    document = {"ok": not bad, "deep": config.deep, "entries": documents}
    rows = [
        (item["key"][:SHORT], item["rows"], item["problem"] or _damage_text(item["damaged"]))
        for item in documents
    ]
    out.result("cache.verify", document, table(["key", "sound rows", "found"], rows) if rows else EMPTY)
    if bad:
        raise CheckFailed(
            f"{len(bad)} of {len(documents)} cache entries are damaged.",
            document=document,
            hint="Damaged shards are in quarantine; their rows are computed again when they are needed.",
        )


@command(
    CachePruneConfig,
    examples=("tlcli cache prune --older-than 30d --dry-run", "tlcli cache prune --max-size 20GB"),
    dry_run=True,
)
def prune(out: Output, config: CachePruneConfig) -> None:
    """Delete old entries, merge small shards, and empty the trash."""
    from tlcli.cache.prune import GRACE_SECONDS, execute_prune, plan_prune
    from tlcli.cache.store import Store
    from tlcli.wording import size_text

    age = config.parsed("older_than")
    size = config.parsed("max_size")
    store = Store(paths.features_dir())
    plan = plan_prune(store, age, size)
    if not out.dry_run:
        execute_prune(store, plan, out.progress)
    document = {
        "dry_run": out.dry_run,
        "retired": _items(plan.retired),
        "kept_in_use": _items(plan.kept),
        "merged_shards": _items(plan.compacted),
        "removed_files": len(plan.removed),
        "freed_now_bytes": plan.bytes_now,
        "freed_later_bytes": plan.bytes_later,
        "grace_seconds": int(GRACE_SECONDS),
    }
    groups = {
        "to the trash": plan.retired,
        "kept": plan.kept,
        "merged": plan.compacted,
        "deleted": plan.removed,
        "in the trash": plan.waiting,
    }
    rows = [
        (item.key and item.key[:SHORT], item.path.name[:SHORT], size_text(item.num_bytes), what, item.reason)
        for what, items in groups.items()
        for item in items
    ]
    would = "would be" if out.dry_run else "are"
    footer = (
        f"\n{size_text(plan.bytes_now)} {would} free now, {size_text(plan.bytes_later)} with the next"
        f" `tlcli cache prune` after {GRACE_SECONDS / 60:.0f} minutes."
    )
    if not rows:
        out.result("cache.prune", document, "There is nothing to prune.")
        return
    out.result("cache.prune", document, table(["key", "file", "size", "", "why"], rows), footer)


def _document(entry: "Summary") -> dict[str, Any]:
    """Return what a list tells of an entry: what exists of the facts people know it by."""
    spec = entry.spec or {}
    cut, compute = spec.get("cut"), spec.get("compute")
    shape = "x".join(str(n) for n in spec.get("row_shape", ()))
    return {
        "key": entry.key,
        "backbone": spec.get("backbone") or spec.get("architecture"),
        "cut": cut.get("node", str(cut)) if isinstance(cut, dict) else cut,
        "row": f"{shape} {spec['row_dtype']}" if shape else None,
        "compute_dtype": compute.get("dtype") if isinstance(compute, dict) else None,
        "rows": entry.num_rows,
        "shards": len(entry.shards),
        "bytes": entry.num_bytes,
        "last_used": datetime.fromtimestamp(entry.last_used, UTC).isoformat(timespec="seconds"),
        "problem": entry.problem,
    }


def _items(items: "tuple[PruneItem, ...]") -> list[dict[str, Any]]:
    return [
        {"key": item.key, "name": item.path.name, "bytes": item.num_bytes, "reason": item.reason}
        for item in items
    ]


def _damage_text(damaged: list[dict[str, Any]]) -> str:
    return "; ".join(f"{item['shard'][:SHORT]}: {item['reason']}" for item in damaged) or "ok"


def _ago(seconds: float) -> str:
    """Return how long ago a time was, for people."""
    age = max(0.0, time.time() - seconds)
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if age >= 2 * length:
            return f"{age / length:.0f} {unit} ago"
    return "just now"
