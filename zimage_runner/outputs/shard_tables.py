"""The columns that describe pictures in shards: img2dataset's names beside tar files, ours in Parquet files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

GROUP_BYTES = 32 << 20
"""Of a Parquet file's row group: readers hold one in memory."""
COLUMNS = (
    ("seed", "int64"),
    ("id", "string"),
    ("width", "int64"),
    ("height", "int64"),
    ("model", "string"),
    ("source", "string"),
    ("record", "string"),
)


def fields_of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture's record says, by the names of ``COLUMNS`` and ``text``; without the record itself."""
    params, model, name = record.get("params") or {}, record.get("model") or {}, record.get("id")
    return {
        "text": record.get("prompt", ""),
        "seed": record.get("seed"),
        "id": None if name is None else str(name),
        "width": params.get("width"),
        "height": params.get("height"),
        "model": model.get("name"),
        "source": record.get("item"),
    }


def as_img2dataset(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Fields of a picture as img2dataset names them, then ours."""
    own = {name: value for name, value in fields.items() if name != "text"}
    head = {"url": None, "caption": fields["text"], "key": key, "status": "success", "error_message": None}
    return {**head, "exif": None, "original_width": own["width"], "original_height": own["height"], **own}


def index_schema() -> Any:
    """Of the table beside a tar file."""
    import pyarrow

    texts = ["url", "caption", "key", "status", "error_message", "exif"]
    columns = [(name, "string") for name in texts]
    columns += [("original_width", "int64"), ("original_height", "int64"), *COLUMNS]
    return pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in columns])


def picture_schema() -> Any:
    """Of a Parquet file with the pictures in it, as Hugging Face's ``datasets`` shows them."""
    import pyarrow

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = [("text", "string"), *COLUMNS]
    features = {"image": {"_type": "Image"}} | {name: {"dtype": kind, "_type": "Value"} for name, kind in columns}
    schema = pyarrow.schema([("image", image), *((name, getattr(pyarrow, kind)()) for name, kind in columns)])
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
