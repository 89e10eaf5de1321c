# Salt: what must hold for every machine of a list, whoever made it. The second run changes nothing.
#
#   salt-call --local --file-root salt state.apply settings
#
# Needs salt (masterless will do). Values are written as they read back (plain bytes and seconds, a newline). by-name/ leads
# to the instance's own directory. autostart comes last, since it asks libvirt: with settle=0 the machine is busy until that
# is done.
{% set machines = {
  'db1': [('description', 'customer database (ask ann)'), ('stop_timeout_seconds', 300)],
  'web1': [('description', 'web shop (ask bob)'), ('stop_timeout_seconds', 60)],
} %}
{% for name, settings in machines.items() %}
{% for file, value in settings + [('disable_terminate', 1), ('autostart', 1)] %}
/vm/by-name/instances/{{ name }}/{{ file }}:
  file.managed:
    - contents: "{{ value }}"
{% endfor %}
{% endfor %}
