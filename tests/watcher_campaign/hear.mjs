// Says every path that chokidar hears of; arguments are the directories.
import { watch } from 'chokidar'

watch(process.argv.slice(2), { followSymlinks: false, ignoreInitial: true })
  .on('all', (_event, path) => console.log(path))
  .on('ready', () => console.log('ready'))
  .on('error', error => { console.error(error); process.exit(1) })
