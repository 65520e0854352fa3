"""Chat templates that loop for ever, or ask for more memory than a machine has."""

FOR, END = "{% for i in range(99999) %}{% for j in range(99999) %}", "{% endfor %}{% endfor %}"
TEMPLATES = {
    "loops": FOR + END,
    "loops that catch errors": FOR + "{% set x = 'a'|int(2) %}" + END,
    "writes": FOR + "x" * 1000 + END,
    "product": "{{ 'x' * 10**11 }}",
    "product of many steps": "{% set x = messages[0].content * 999 %}{{ (x * 9999) * 9999 }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x|length }}",
    "number": "{{ 9**(9**9) }}",
    "number by constants": "{% if 7**(7**9) > 3 %}a{% endif %}",
    "width": "{{ '%99999999999d' % 1 }}",
    "justified": "{{ 'x'.ljust(99999999999) }}",
    "centred": "{{ 'x'|center(99999999999) }}",
    "indented": "{{ 'x\ny'|indent(99999999999) }}",
    "replaced": "{{ ('x' * 30000).replace('x', 'y' * 300000) }}",
    "joined": "{{ range(99999)|join('x' * 999999) }}",
    "calls itself": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "many calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "long": "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'x' * 9999999 }}",
}
