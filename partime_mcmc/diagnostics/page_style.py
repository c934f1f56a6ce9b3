"""What stands in the head of a report page: its policy and its style, light and dark."""

HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>
:root {
  --ink: #1b2a41; --soft: #5d6b7e; --paper: #ffffff; --card: #f4f6f9; --grid: #dfe3e8; --good: #0a7d4f; --bad: #b3341f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e9f0; --soft: #9fabba; --paper: #12161c; --card: #1c222b; --grid: #323b47; --good: #4cc38a; --bad: #ff8a73;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
p { margin: .3rem 0; }
.verdict { font-size: 1.1rem; font-weight: 600; }
.verdict span { display: inline-block; width: 1.3em; }
.good { color: var(--good); }
.bad, tr.bad th, tr.bad td { color: var(--bad); }
.unknown, .note { color: var(--soft); }
.note { font-size: .9rem; max-width: 50rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.facts div { background: var(--card); border-radius: .4rem; padding: .5rem .8rem; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th:first-child { text-align: left; font-weight: 600; padding-left: 0; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
figure { margin: .5rem 0; overflow-x: auto; }
figure svg { display: block; width: 100%; height: auto; min-width: 34rem; }
pre { font-size: .78rem; overflow-x: auto; background: var(--card); padding: .8rem; border-radius: .4rem; }
summary { cursor: pointer; margin-top: .6rem; }
@media print { section { break-inside: avoid; } }
</style>
"""
