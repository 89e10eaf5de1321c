#!/usr/bin/env node
// Tells a web hook (chat, ticket system, pager) of every change of an instance's state, whoever made it.
//
// usage: node state-webhook.mjs URL     runs until ended; as a service: Restart=always, After=instancefs.service
//
// Needs Node 18 and chokidar: npm install chokidar@4.0.3. Environment: INSTANCEFS (the tree, /vm).
// Without usePolling: the tree wakes inotify.
import { readFile } from 'node:fs/promises'
import { basename, dirname } from 'node:path'
import { watch } from 'chokidar'

const instances = `${process.env.INSTANCEFS ?? '/vm'}/instances`
const [url] = process.argv.slice(2)
const read = async path => (await readFile(path, 'utf8')).trim()
const states = new Map()

// An event says that something happened; what is true is read, and told if it is news. One at a time, in order.
let queue = Promise.resolve()
const look = path => { queue = queue.then(() => tell(path)).catch(error => console.error(`${path}: ${error.message}`)) }

async function tell (path) {
  const uuid = basename(dirname(path))
  const [from, to] = [states.get(uuid), await read(path)]
  states.set(uuid, to)
  if (from === undefined || from === to) return
  const body = JSON.stringify({ uuid, name: await read(`${instances}/${uuid}/name`), from, to })
  const answer = await fetch(url, { method: 'POST', headers: { 'content-type': 'application/json' }, body })
  if (!answer.ok) console.error(`${url}: ${answer.status}`)
}

watch(instances, {
  depth: 1,
  // Of each instance only its state.
  ignored: (path, stats) => stats?.isFile() && basename(path) !== 'state'
})
  .on('add', look)
  // Not 'change': of two events within 5 ms chokidar drops the second, on every file system, and that may be the last one.
  .on('raw', (_event, _name, { watchedPath }) => { if (basename(watchedPath) === 'state') look(watchedPath) })
  .on('unlink', path => states.delete(basename(dirname(path))))
  .on('error', error => { console.error(error); process.exit(1) })
  .on('ready', () => queue.then(() => console.log('ready')))
