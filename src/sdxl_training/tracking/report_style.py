"""The look of report.html: one style sheet for light and dark, wide and narrow; one small script for the slider."""

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #22262b; --soft: #667079; --rule: #e2e3e0;
  --line: #2563a8; --faint: #2563a855; --bad: #b3372f; --good: #2e7d4f; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --card: #1f2226; --ink: #e4e6e8; --soft: #98a1a9; --rule: #33383e;
    --line: #74aef0; --faint: #74aef055; --bad: #f08a80; --good: #74c79a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .7rem; }
.note, .empty { color: var(--soft); font-size: .85rem; margin: .4rem 0 0; }
.state { margin: .2rem 0 0; color: var(--soft); }
.state b { color: var(--good); font-weight: 600; }
.state b.stopped { color: var(--bad); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: 1px; margin: 1.2rem 0 0;
  background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; overflow: hidden; }
.facts div { box-shadow: 0 0 0 1px var(--rule); padding: .6rem .9rem; }
.facts dt { color: var(--soft); font-size: .78rem; }
.facts dd { margin: 0; font-size: 1.1rem; }
.card, .chart { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: 1rem;
  margin: 0; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.charts .chart:first-child { grid-column: 1 / -1; }
.charts .chart:first-child .plot { height: 20rem; }
.chart figcaption { font-weight: 600; margin-bottom: .8rem; }
.key { font-weight: 400; font-size: .82rem; color: var(--soft); margin-left: 1rem; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 1.1rem; border-top: 3px solid var(--line);
  margin-right: .4rem; vertical-align: middle; }
.key.raw::before { border-color: var(--faint); }
.plot { position: relative; height: 12rem; margin: 0 .8rem 1.5rem 3rem; }
.plot svg { width: 100%; height: 100%; display: block; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke: var(--line); stroke-width: 1.75px;
  stroke-linejoin: round; }
.plot path.raw { stroke: var(--faint); stroke-width: 1px; }
.plot path.grid { stroke: var(--rule); stroke-width: 1px; }
.plot span { position: absolute; font-size: .75rem; color: var(--soft); white-space: nowrap; }
.plot .x { top: 100%; transform: translate(-50%, .35rem); }
.plot .y { right: 100%; transform: translate(-.5rem, -50%); }
.frames img { display: block; max-width: 100%; height: auto; margin: 0 auto; border-radius: .3rem; }
.frames figure { margin: 0; }
.frames figcaption { text-align: center; color: var(--soft); font-size: .85rem; margin-top: .5rem; }
.frames .row { display: flex; gap: .8rem; overflow-x: auto; margin-top: 1rem; padding-bottom: .4rem; }
.frames .row:empty, .prompts:empty { display: none; }
.frames .row figure { flex: 0 0 9rem; }
.frames input { display: block; width: min(100%, 40rem); margin: .8rem auto 0; accent-color: var(--line); }
.prompts { columns: 18rem; margin: 1rem 0 0; padding-left: 1.8rem; font-size: .85rem; color: var(--soft); }
.prompts li { break-inside: avoid; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th { text-align: left; font-weight: 400; white-space: nowrap; }
td, th { padding: .25rem .6rem .25rem 0; vertical-align: top; }
.bars td { text-align: right; white-space: nowrap; width: 1%; }
.bars th { width: 1%; }
.bars .bar { width: auto; vertical-align: middle; }
.bars .bar span { display: block; height: .8rem; min-width: 1px; background: var(--line); border-radius: .2rem; }
.list td, .list th { border-top: 1px solid var(--rule); overflow-wrap: anywhere; white-space: normal; }
.list tr:first-child > * { border-top: 0; }
.list thead th { color: var(--soft); }
pre { margin: 0; overflow-x: auto; font-size: .82rem; line-height: 1.45; }
summary { cursor: pointer; color: var(--soft); }
"""

SCRIPT = """
const frames = document.querySelector(".frames");
const figures = frames ? [...frames.querySelectorAll(".row figure"), frames.querySelector(".shown")] : [];
if (figures.length > 1) {
  const image = frames.querySelector(".shown img"), caption = frames.querySelector(".shown figcaption");
  const views = figures.map(f => [f.querySelector("img").src, f.querySelector("figcaption").textContent]);
  const slider = document.createElement("input");
  const show = () => { [image.src, caption.textContent] = views[slider.value]; };
  slider.type = "range"; slider.max = views.length - 1; slider.value = slider.max; slider.oninput = show;
  slider.setAttribute("aria-label", "which samples are shown, by time");
  frames.querySelector(".shown").after(slider);
  figures.slice(0, -1).forEach((f, i) => f.onclick = () => { slider.value = i; show(); });
}
"""
