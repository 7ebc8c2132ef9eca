"""The tables of the embedded store's SQLite file. The statements that read and write them are in
`service/search/database.py`, which also makes the tables of each collection."""

from typing import Final

from service.sqlite import Schema

SCHEMA: Final = Schema(
    what="a vector store",
    application_id=0x64763273,  # "dv2s"
    first_version=2,
    scripts=(
        """
CREATE TABLE collections (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL,
    count INTEGER NOT NULL DEFAULT 0,    -- of items
    version INTEGER NOT NULL DEFAULT 0,  -- grows with every change
    edits INTEGER NOT NULL DEFAULT 0,    -- grows when metadata changes without its vector
    sealed INTEGER NOT NULL DEFAULT 0    -- vectors up to this number are in segments
);
CREATE TABLE aliases (name TEXT PRIMARY KEY, collection INTEGER NOT NULL REFERENCES collections (id));
CREATE TABLE segments (
    id INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL REFERENCES collections (id) ON DELETE CASCADE,
    folder TEXT NOT NULL, kind TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, count INTEGER NOT NULL,
    effort INTEGER NOT NULL,  -- efSearch or nprobe that reaches the target recall
    files TEXT NOT NULL       -- JSON: name -> [bytes, xxh3]
);
CREATE TABLE requests (
    collection INTEGER NOT NULL REFERENCES collections (id) ON DELETE CASCADE, key TEXT NOT NULL,
    digest BLOB NOT NULL, created REAL NOT NULL, PRIMARY KEY (collection, key)
);
""",
        # Version 3: a collection may have a partner, a hidden collection with the same items and the vectors of another
        # model (service/search/partners.py). `role` is live, candidate or former. `earlier` lists the models that made
        # the collection's vectors before, as JSON: [[fingerprint, dimension], ...].
        """
ALTER TABLE collections ADD COLUMN partner INTEGER REFERENCES collections (id) ON DELETE SET NULL;
ALTER TABLE collections ADD COLUMN role TEXT NOT NULL DEFAULT 'live';
ALTER TABLE collections ADD COLUMN earlier TEXT NOT NULL DEFAULT '[]';
""",
        # Version 4: the number of idempotency keys is limited, also for each client. `client` is a hash of the sender,
        # and `ordinal` counts the sender's keys. Rows are deleted by age, by rowid and by ordinal.
        """
ALTER TABLE requests ADD COLUMN client BLOB NOT NULL DEFAULT x'';
ALTER TABLE requests ADD COLUMN ordinal INTEGER NOT NULL DEFAULT 0;
CREATE INDEX requests_by_age ON requests (created);
CREATE INDEX requests_by_client ON requests (client, ordinal);
""",
    ),
)
