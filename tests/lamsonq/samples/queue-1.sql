-- A queue's database of schema version 1.
BEGIN TRANSACTION;
CREATE TABLE jobs (
    id         integer primary key,
    queue      text    not null default 'jobs',
    key        any     not null default (strftime('%s.M', 'now') || substr(strftime('%f', 'now'), -3) || '000P0Q' || printf('%010d', last_insert_rowid()) || '.' || lower(hex(randomblob(8)))),
    state      text    not null default 'ready'
               check (state in ('ready', 'delayed', 'parked', 'reserved', 'dead', 'done')),
    priority   integer not null default 0 check (priority between 0 and 4294967295),
    deliveries integer not null default 0,   -- claims that were never settled
    attempts   integer not null default 0,   -- failures
    received   real    not null default ((julianday('now') - 2440587.5) * 86400.0),
    since      real    not null default ((julianday('now') - 2440587.5) * 86400.0),
    due        real,
    expires    real,
    token      text    not null default '',  -- <worker>/<number of the claim>
    lane       text,                         -- where it is parked
    sender     any,
    recipients text    not null default '[]',
    peer       any,
    target     any,
    uniq       any,
    metadata   text    not null default '{}',
    report     text    not null default '',
    file       text,                         -- a large body, in the folder beside the database
    body       any
) strict;
INSERT INTO "jobs" VALUES(1,'posts','1700000000.M000001P1Q1.host','dead',0,0,1,1700000000.0,1700000000.0,NULL,NULL,'',NULL,NULL,'[]',NULL,NULL,NULL,'{}','2023-11-14T22:13:20.000Z attempt 1: no such list

',NULL,X'6E6F');
INSERT INTO "jobs" VALUES(2,'posts','1700000000.M000002P1Q2.host','done',0,0,0,1700000000.0,1700000000.0,NULL,NULL,'',NULL,NULL,'[]',NULL,NULL,NULL,'{}','',NULL,X'6172636869766564');
INSERT INTO "jobs" VALUES(3,'posts','1700000000.M000003P1Q3.host','reserved',5,1,0,1700000000.0,1700000000.0,NULL,NULL,'4711.0123abcd/1.3',NULL,NULL,'[]',NULL,NULL,NULL,'{}','',NULL,X'636C61696D6564');
INSERT INTO "jobs" VALUES(4,'posts','1700000000.M000004P1Q4.host','ready',1,0,0,1700000000.0,1700000000.0,NULL,NULL,'',NULL,'a@example.org','["b@example.org", "\u00fc@example.org"]','127.0.0.1:4242',NULL,NULL,'{"k": "v"}','',NULL,X'6669727374');
INSERT INTO "jobs" VALUES(5,'posts','1700000000.M000005P1Q5.host','ready',0,0,0,1700000000.0,1700000000.0,NULL,NULL,'',NULL,NULL,'[]',NULL,'app.handlers.index.START',NULL,'{}','',NULL,X'757267656E74');
INSERT INTO "jobs" VALUES(6,'posts','1700000000.M000006P1Q6.host','delayed',0,0,0,1700000000.0,1700000000.0,1700001000.0,NULL,'',NULL,NULL,'[]',NULL,NULL,'u','{}','',NULL,X'6C61746572');
INSERT INTO "jobs" VALUES(7,'posts','1700000000.M000007P1Q7.host','ready',9,0,0,1700000000.0,1700000000.0,NULL,NULL,'',NULL,NULL,'[]',NULL,NULL,NULL,'{}','',NULL,X'');
INSERT INTO "jobs" VALUES(8,'posts','1700000000.M000008P1Q8.host','parked',2,0,0,1700000000.0,1700000000.0,NULL,NULL,'','concurrency sender ',NULL,'[]',NULL,NULL,NULL,'{}','',NULL,X'7061726B6564');
CREATE TABLE lamsonq (version integer not null) strict;
INSERT INTO "lamsonq" VALUES(1);
CREATE TABLE lamsonq_doomed (file text primary key) strict, without rowid;
CREATE TABLE lamsonq_gates (
    queue text not null, key any not null, last real not null, until real not null, primary key (queue, key)
) strict, without rowid;
INSERT INTO "lamsonq_gates" VALUES('posts','cron',100.0,9e999);
CREATE TABLE lamsonq_lanes (  -- who has a place in a lane
    queue text not null, lane text not null, job integer not null, primary key (queue, lane, job)
) strict, without rowid;
CREATE TABLE lamsonq_outgoing (  -- what settled jobs have put into other stores and is not there yet
    id integer primary key, worker text not null, store text not null, record blob not null, body blob not null
) strict;
CREATE TABLE lamsonq_queues (name text primary key, paused integer not null default 0) strict, without rowid;
INSERT INTO "lamsonq_queues" VALUES('paused',1);
CREATE TABLE lamsonq_rates (  -- when the next job of a lane may begin
    queue text not null, lane text not null, next real not null, primary key (queue, lane)
) strict, without rowid;
CREATE UNIQUE INDEX jobs_key on jobs (queue, key);
CREATE UNIQUE INDEX jobs_uniq on jobs (queue, uniq)
    where uniq is not null and state in ('ready', 'delayed', 'parked', 'reserved');
CREATE INDEX jobs_fresh on jobs (queue, priority, key, received) where state = 'ready' and deliveries = 0;
CREATE INDEX jobs_suspect on jobs (queue, priority, key, received) where state = 'ready' and deliveries > 0;
CREATE INDEX jobs_target on jobs (queue, target, priority, key, deliveries)
    where state = 'ready' and target is not null;
CREATE INDEX jobs_delayed on jobs (queue, due, key) where state = 'delayed';
CREATE INDEX jobs_parked on jobs (queue, lane, priority, key, received) where state = 'parked';
CREATE INDEX jobs_reserved on jobs (token, queue) where state = 'reserved';
CREATE INDEX jobs_dead on jobs (queue, since) where state = 'dead';
CREATE INDEX jobs_done on jobs (queue, since) where state = 'done';
CREATE INDEX jobs_file on jobs (file) where file is not null;
CREATE INDEX lamsonq_gates_until on lamsonq_gates (until);
CREATE INDEX lamsonq_lanes_job on lamsonq_lanes (job);
CREATE TRIGGER lamsonq_doom after delete on jobs when old.file is not null
    begin insert or ignore into lamsonq_doomed values (old.file); end;
COMMIT;
