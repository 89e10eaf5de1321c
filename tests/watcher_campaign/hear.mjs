// Says every path that chokidar hears of; arguments are the directories.
import { basename, join } from 'node:path'
import { watch } from 'chokidar'

watch(process.argv.slice(2), { followSymlinks: false, ignoreInitial: true })
  .on('all', (_event, path) => console.log(path))
  // Of two events within 5 ms chokidar drops the second.
  .on('raw', (_event, name, { watchedPath }) => {
    console.log(!name || basename(watchedPath) === name ? watchedPath : join(watchedPath, name))
  })
  .on('ready', () => console.log('ready'))
  .on('error', error => { console.error(error); process.exit(1) })
