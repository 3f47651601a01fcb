"""One HTML page that needs nothing beside it: sections with a table of contents, tables that the reader sorts, a style for print."""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from lesionbench.reports.sheets import Sheet


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: plain text, its heading and its line in the contents.
        body: HTML that stands before the parts.
        parts: sections inside of it, one level deep.
        heading: plain text of the heading where it says more than the title.
    """

    title: str
    body: str = ""
    parts: Sequence["Section"] = field(default_factory=list)
    heading: str = ""


def page(title: str, opening: str, sections: Sequence[Section]) -> str:
    """The page as HTML: `title` (plain text), `opening` (HTML) and the sections, beside their contents."""
    entries, bodies = [], []
    for place, section in enumerate(sections, 1):
        inner = [(f"s{place}-{number}", part) for number, part in enumerate(section.parts, 1)]
        below = "".join(f"<li>{_link(name, part)}</li>" for name, part in inner)
        entries.append(f"<li>{_link(f's{place}', section)}{f'<ul>{below}</ul>' if below else ''}</li>")
        parts = "".join(f"<section id={name}><h3>{_heading(part)}</h3>{part.body}</section>" for name, part in inner)
        bodies.append(f"<section id=s{place}><h2>{_heading(section)}</h2>{section.body}{parts}</section>")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<nav aria-label=Contents><b>Contents</b><ul>{''.join(entries)}</ul></nav>"
        f"<main><h1>{html.escape(title)}</h1>{opening}{''.join(bodies)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _link(name: str, section: Section) -> str:
    return f"<a href='#{name}'>{html.escape(section.title)}</a>"


def _heading(section: Section) -> str:
    return html.escape(section.heading or section.title)


def note(text: str) -> str:
    """A remark, plain text."""
    return f"<p class=note>{html.escape(text)}</p>"


def table(sheet: Sheet) -> str:
    """The sheet as a table in a box of its own, which scrolls where it is too wide; a click on the name of a column sorts by it."""
    columns = list(zip(*sheet.rows, strict=True)) or [()] * len(sheet.columns)
    keys = [_sort_keys(column, named=place < sheet.fixed) for place, column in enumerate(columns)]
    head = "".join(f"<th scope=col><button type=button title='sort by this column'>{_lines(name)}</button></th>" for name in sheet.columns)
    rows = "".join(
        "<tr>" + "".join(_cell(cell, keys[at][place], at < sheet.fixed) for at, cell in enumerate(row)) + "</tr>"
        for place, row in enumerate(sheet.rows)
    )
    box = f"<div class=scroll tabindex=0 role=region aria-label='{html.escape(sheet.title)}'>"
    longest = max((len(row[0]) for row in sheet.rows), default=0)
    return f"{box}<table style='--name:{longest}ch'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _cell(text: str, key: float, named: bool) -> str:
    value = "" if math.isnan(key) else f" data-v='{'Infinity' if key == math.inf else f'{key:.12g}'}'"
    if named:  # long names break after these
        broken = re.sub(r"([/_]|, )", r"\1<wbr>", html.escape(text))
        return f"<td{value}>{broken}</td>"
    return f"<td class=n{value}>{_lines(text)}</td>"


def _lines(text: str) -> str:
    return "<br>".join(html.escape(line) for line in text.split("\n"))


def _sort_keys(column: Sequence[str], named: bool) -> list[float]:
    """The number that each cell is sorted by, NaN where it holds none: the first in it, 0 for `<0.001`.

    A column that names the rows is sorted as text, unless all its names end in a number, as `seed=10`.
    """
    if named:
        column = [text.rpartition("=")[2] for text in column]
    keys = [_number(text) for text in column]
    return [math.nan] * len(keys) if named and any(map(math.isnan, keys)) else keys


def _number(text: str) -> float:
    if text.startswith("<"):
        return 0.0
    found = re.match(r"[-+]?(inf|\d[\d,]*(\.\d+)?(e[-+]?\d+)?)(?![\w.])", text)
    return float(found[0].replace(",", "")) if found else math.nan


_STYLE = """
*{box-sizing:border-box}
body{margin:0;font:15px/1.45 system-ui,sans-serif;color:#222;background:#fff}
main{padding:1rem 1.5rem 3rem;min-width:0}
nav{padding:1rem 1.5rem;background:#f7f7f7;border-bottom:1px solid #ddd}
nav ul{margin:.3em 0;padding-left:1.1em}
nav ul ul{margin:0}
nav a{color:#1a4f8b;text-decoration:none;overflow-wrap:anywhere}
nav a:hover,nav a:focus{text-decoration:underline}
h1{margin:.3em 0;font-size:1.6rem;overflow-wrap:anywhere}
h2{margin:2em 0 .6em;border-bottom:2px solid #ddd}
h3{margin:1.4em 0 .4em;font-size:1.05rem;overflow-wrap:anywhere}
.note{color:#595959;margin:.4em 0;overflow-wrap:anywhere}
.scroll,.plot{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;margin:.3em 0}
td,th{border:1px solid #ccc;padding:.25em .6em;text-align:left;vertical-align:top}
td:first-child{min-width:min(var(--name),15rem);max-width:26rem;overflow-wrap:anywhere}
.n{white-space:nowrap;font-variant-numeric:tabular-nums}
th{background:#f3f3f3;padding:0}
th button{width:100%;border:0;padding:.3em .6em;background:none;font:inherit;font-weight:600;text-align:left;color:inherit;cursor:pointer}
th button:hover{background:#e6e6e6}
th button::after{content:' \\2195';color:#999}
th[aria-sort=ascending] button::after{content:' \\2191';color:#222}
th[aria-sort=descending] button::after{content:' \\2193';color:#222}
figure{margin:.6em 0 1.2em}
figcaption{color:#595959;overflow-wrap:anywhere}
.plot svg{display:block;width:100%;height:auto;min-width:calc(var(--w)*.75);max-width:calc(var(--w)*1.4)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2em 1.2em;margin:.3em 0;padding:0}
.legend li{overflow-wrap:anywhere}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:50%;print-color-adjust:exact}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:0 1em}
.pictures img{width:100%;max-width:640px}
pre{background:#f7f7f7;padding:.6em;overflow-x:auto}
details{margin:.3em 0}
summary{overflow-wrap:anywhere}
@media print,(max-width:999px){
main,nav{padding:.8rem 1rem}
nav ul{padding:0;list-style:none}
nav li{display:flex;gap:.1em 1em}
nav ul ul{display:flex;flex-wrap:wrap;gap:.1em 1em}
}
@media screen and (min-width:1000px){
body{display:grid;grid-template-columns:15rem minmax(0,1fr)}
nav{position:sticky;top:0;align-self:start;height:100vh;overflow-y:auto;border:0;border-right:1px solid #ddd}
}
@media print{
@page{size:A4 landscape;margin:12mm}
body{font-size:9pt}
main,nav{padding:0}
nav{background:none;border:0}
.scroll,.plot,pre{overflow:visible}
table{font-size:8pt}
th,thead{print-color-adjust:exact}
thead{display:table-header-group}
td,th,td:first-child{min-width:0;overflow-wrap:break-word}
.n{white-space:normal;overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
.plot svg{min-width:0;max-width:min(100%,var(--w));max-height:140mm}
.legend{gap:0 1em;font-size:8pt}
tr,figure,figcaption,svg,img{break-inside:avoid}
h1,h2,h3,summary{break-after:avoid}
th{padding:.25em .6em}
th button{display:contents}
th button::after,details button{display:none}
details::details-content{content-visibility:visible;block-size:auto}
}
"""
# sorting is stable: by one column, then by another, sorts within equal values of the latter; print unfolds where the style alone cannot
_SCRIPT = """
function copy_text(b){navigator.clipboard.writeText(b.nextElementSibling.textContent);b.textContent='copied'}
function sort_by(th){
const body=th.closest('table').tBodies[0],rows=[...body.rows],at=th.cellIndex;
const sign=th.getAttribute('aria-sort')==='ascending'?-1:1;
const numbers=rows.some(r=>r.cells[at].dataset.v!==undefined);
const key=r=>{const c=r.cells[at];return numbers?(c.dataset.v===undefined?null:+c.dataset.v):c.textContent||null};
const order=(a,b)=>a===null||b===null?(a===null)-(b===null):sign*(numbers?(a>b)-(a<b):a.localeCompare(b,'en',{numeric:true}));
body.append(...rows.map(r=>[key(r),r]).sort((a,b)=>order(a[0],b[0])).map(r=>r[1]));
for(const other of th.parentNode.cells)other.removeAttribute('aria-sort');
th.setAttribute('aria-sort',sign>0?'ascending':'descending');
}
document.querySelectorAll('th button').forEach(b=>b.addEventListener('click',()=>sort_by(b.parentNode)));
let folded=[];
addEventListener('beforeprint',()=>{folded=[...document.querySelectorAll('details:not([open])')];folded.forEach(d=>d.open=true)});
addEventListener('afterprint',()=>folded.forEach(d=>d.open=false));
"""
