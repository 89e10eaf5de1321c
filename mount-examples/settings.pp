# Puppet: what must hold for every machine of a list, whoever made it. The second run changes nothing.
#
#   puppet apply settings.pp
#
# Needs puppet-agent; no option that only this tree needs. Values are written as they read back (plain bytes and seconds, a
# newline). by-name/ leads to the instance's own directory.
$machines = {
  'db1'  => { 'description' => 'customer database (ask ann)', 'stop_timeout_seconds' => 300 },
  'web1' => { 'description' => 'web shop (ask bob)', 'stop_timeout_seconds' => 60 },
}

$machines.each |$name, $settings| {
  $instance = "/vm/by-name/instances/${name}"

  ($settings + { 'disable_terminate' => 1 }).each |$file, $value| {
    file { "${instance}/${file}":
      content => "${value}\n",
      # Last comes what asks libvirt: with settle=0 the machine is busy until that is done.
      before  => File["${instance}/autostart"],
    }
  }
  file { "${instance}/autostart":
    content => "1\n",
  }
}
