// Numbers, times and names as people read them.

export const count = (n) => Number(n).toLocaleString("en");

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${String(minutes % 60).padStart(2, "0")} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** "1 job", "8 jobs", "3 of 8 jobs begun" of a multirun. */
export function jobsOf(sweep) {
  const jobs = `${count(sweep.jobs_in_all)} job${sweep.jobs_in_all === 1 ? "" : "s"}`;
  return sweep.jobs.length < sweep.jobs_in_all ? `${count(sweep.jobs.length)} of ${jobs} begun` : jobs;
}

export const gb = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} GB`;

export function bytes(n) {
  if (n === null || n === undefined) return "";
  if (n < 1e6) return `${(n / 1e3).toFixed(0)} kB`;
  return `${(n / 1e6).toFixed(1)} MB`;
}

export function speed(perSecond) {
  if (!perSecond) return "";
  return perSecond >= 0.1 ? `${perSecond.toFixed(2)} images/s` : `${(1 / perSecond).toFixed(1)} s an image`;
}

export function when(milliseconds) {
  if (!milliseconds) return "";
  const date = new Date(milliseconds);
  const options = { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" };
  if (date.getFullYear() !== new Date().getFullYear()) options.year = "numeric";
  return date.toLocaleString("en-GB", options);
}

const STAMP = /^(\d{4})-(\d{2})-(\d{2})_(\d{2})-(\d{2})-(\d{2})/;

/** {title, detail} of a run's or multirun's path: the folder's name, and when it began. */
export function nameOf(path) {
  const parts = path.split("/").filter(Boolean);
  const last = parts[parts.length - 1] || "this run";
  const match = STAMP.exec(last);
  if (!match) return { title: last, detail: parts.slice(0, -1).join("/") };
  const [, year, month, day, hour, minute, second] = match.map(Number);
  const began = when(new Date(year, month - 1, day, hour, minute, second).getTime());
  return { title: parts[parts.length - 2] || last, detail: began };
}

export function runName(run) {
  if (run.sweep !== null && run.sweep !== undefined && run.job !== null) {
    const sweep = nameOf(run.sweep);
    return { title: `${sweep.title}, job ${run.job}`, detail: sweep.detail };
  }
  return nameOf(run.path);
}

export const STATES = {
  running: "running", finished: "finished", failures: "finished, with failures", interrupted: "interrupted",
  empty: "nothing drawn",
};
