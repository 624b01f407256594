"""The tables of the database, and how a database of an older release becomes one of this."""

SCHEMA_VERSION = 3
APPLICATION_ID = 0x6A6F6277

SCHEMA = """
CREATE TABLE job (
    id              INTEGER PRIMARY KEY AUTOINCREMENT CHECK (id <= 2147483647),
    name            TEXT    NOT NULL,
    state           TEXT    NOT NULL,
    attempt         INTEGER NOT NULL DEFAULT 0,
    failures        INTEGER NOT NULL DEFAULT 0,
    cancelling      INTEGER NOT NULL DEFAULT 0,
    priority        INTEGER NOT NULL DEFAULT 0,
    worker          INTEGER,
    exit_code       INTEGER,
    reason          TEXT,
    environment     TEXT,
    not_before      REAL,
    created_at      REAL    NOT NULL,
    started_at      REAL,
    finished_at     REAL,
    log_bytes       INTEGER NOT NULL DEFAULT 0,
    reading         INTEGER NOT NULL DEFAULT 0,
    cause           INTEGER,
    due_at          REAL,
    variables       TEXT
) STRICT;
CREATE INDEX job_queued ON job (name, not_before, priority DESC, id) WHERE state = 'queued';
CREATE INDEX job_delayed ON job (not_before) WHERE not_before IS NOT NULL;
CREATE INDEX job_state ON job (state, id);
CREATE INDEX job_name ON job (name, id);
CREATE INDEX job_finished ON job (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX job_ended ON job (name, state, id) WHERE finished_at IS NOT NULL;
CREATE INDEX job_cause ON job (cause, id) WHERE cause IS NOT NULL;
CREATE INDEX job_worker ON job (worker, state, id) WHERE finished_at IS NOT NULL;
CREATE INDEX job_due ON job (name) WHERE due_at IS NOT NULL AND finished_at IS NULL;

CREATE TABLE request (
    key TEXT PRIMARY KEY, content TEXT, first INTEGER NOT NULL, jobs INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX request_first ON request (first);

CREATE TABLE attempt (
    job INTEGER NOT NULL, attempt INTEGER NOT NULL, worker INTEGER, started_at REAL, finished_at REAL,
    exit_code INTEGER, reason TEXT, log_bytes INTEGER NOT NULL, PRIMARY KEY (job, attempt)
) STRICT, WITHOUT ROWID;

CREATE TABLE log (
    job INTEGER NOT NULL, attempt INTEGER NOT NULL, byte_offset INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (job, attempt, byte_offset)
) STRICT, WITHOUT ROWID;

CREATE TABLE worker (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, expected INTEGER NOT NULL DEFAULT 1,
    protocol INTEGER NOT NULL DEFAULT 2, slots INTEGER NOT NULL DEFAULT 0, tags TEXT NOT NULL DEFAULT '[]',
    address TEXT, version TEXT, connected INTEGER NOT NULL DEFAULT 0, connected_at REAL, gone_at REAL, held TEXT
) STRICT;
CREATE INDEX worker_expected ON worker (id) WHERE expected = 1;
CREATE INDEX worker_gone ON worker (gone_at) WHERE gone_at IS NOT NULL;
CREATE TABLE schedule (
    name TEXT PRIMARY KEY, text TEXT NOT NULL, upto REAL NOT NULL,
    missed INTEGER NOT NULL DEFAULT 0, skipped INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE TABLE server (id TEXT NOT NULL, clock REAL NOT NULL DEFAULT 0) STRICT;
"""

# From each schema version to the next. 1 knew a worker of the original's protocol by its name alone, and of a request
# with an idempotency key only the job. 2, of before the release of 1.1.0, had other indexes of what has ended.
MIGRATIONS = {
    1: """
ALTER TABLE worker ADD COLUMN protocol INTEGER NOT NULL DEFAULT 2;
ALTER TABLE worker ADD COLUMN slots INTEGER NOT NULL DEFAULT 0;
ALTER TABLE worker ADD COLUMN tags TEXT NOT NULL DEFAULT '[]';
ALTER TABLE worker ADD COLUMN address TEXT;
ALTER TABLE worker ADD COLUMN version TEXT;
ALTER TABLE worker ADD COLUMN connected INTEGER NOT NULL DEFAULT 0;
ALTER TABLE worker ADD COLUMN connected_at REAL;
ALTER TABLE worker ADD COLUMN gone_at REAL;
ALTER TABLE worker ADD COLUMN held TEXT;
CREATE INDEX worker_gone ON worker (gone_at) WHERE gone_at IS NOT NULL;
UPDATE worker SET protocol = 1 WHERE name GLOB 'version-1-????????';
CREATE INDEX worker_expected ON worker (id) WHERE expected = 1;
CREATE TABLE request (
    key TEXT PRIMARY KEY, content TEXT, first INTEGER NOT NULL, jobs INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX request_first ON request (first);
INSERT INTO request SELECT idempotency_key, NULL, id, 1 FROM job WHERE idempotency_key IS NOT NULL;
DROP INDEX job_idempotency_key;
DROP INDEX job_ready;
CREATE INDEX job_queued ON job (name, not_before, priority DESC, id) WHERE state = 'queued';
ALTER TABLE job DROP COLUMN idempotency_key;
ALTER TABLE job ADD COLUMN reading INTEGER NOT NULL DEFAULT 0;
ALTER TABLE job ADD COLUMN cause INTEGER;
ALTER TABLE job ADD COLUMN due_at REAL;
ALTER TABLE job ADD COLUMN variables TEXT;
CREATE INDEX job_success ON job (name, id) WHERE state = 'success';
CREATE INDEX job_cause ON job (cause, id) WHERE cause IS NOT NULL;
CREATE INDEX job_worker ON job (worker, id) WHERE worker IS NOT NULL;
CREATE INDEX job_due ON job (name) WHERE due_at IS NOT NULL AND finished_at IS NULL;
CREATE TABLE schedule (
    name TEXT PRIMARY KEY, text TEXT NOT NULL, upto REAL NOT NULL,
    missed INTEGER NOT NULL DEFAULT 0, skipped INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
ALTER TABLE server ADD COLUMN clock REAL NOT NULL DEFAULT 0;
""",
    2: """
DROP INDEX job_success;
DROP INDEX job_worker;
CREATE INDEX job_ended ON job (name, state, id) WHERE finished_at IS NOT NULL;
CREATE INDEX job_worker ON job (worker, state, id) WHERE finished_at IS NOT NULL;
""",
}
