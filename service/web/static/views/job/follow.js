// A job as it goes: what it is asked once is kept in step by its events.
import { all, follow, get } from "../../api.js";
import { useEffect, useRef, useSignedIn, useState } from "../../ui.js";

const LONGEST_PAUSE = 30; // seconds between tries while the service is away
const UNNOTICED = 2; // seconds without a connection before it is worth a word
const DRAWN_EVERY = 0.15; // seconds: a replay of thousands of events is drawn a few times, not thousands
const MOST_EVENTS = 50_000;
const ENDED = ["succeeded", "failed", "cancelled"];

/** What a job's events tell, in order, each number once however often it is replayed. */
export class Story {
  last = 0;
  log = [];
  losses = []; // [epoch, training loss], a few hundred a run
  epochs = []; // { epoch, validation_macro_f1, validation_loss }, one per epoch

  /** Gives whether the event is new. Progress has the number of the event before it, and is not kept. */
  add(event) {
    if (event.type === "progress") return true;
    if (event.id <= this.last) return false;
    this.last = event.id;
    this.log.push(event);
    if (event.type === "metric") this.#measure(event.data);
    return true;
  }

  #measure(data) {
    if (typeof data.epoch !== "number") return; // a measurement of another kind
    if (typeof data.validation_macro_f1 === "number") {
      this.epochs = [...this.epochs.filter(({ epoch }) => epoch < data.epoch), data];
    } else if (typeof data.train_loss === "number") {
      // An attempt that goes on from a checkpoint repeats what came after it.
      while (this.losses.length && this.losses.at(-1)[0] >= data.epoch) this.losses.pop();
      this.losses.push([data.epoch, data.train_loss]);
    }
  }
}

/**
 * `{ job, story, error, state, restart }`. `state` is "lost" while nothing can be heard; a job that cannot be had at
 * all gives `error`. `restart(job)` takes the job as an action left it and follows it anew.
 */
export function useJob(id) {
  const [job, setJob] = useState(null);
  const [error, setError] = useState(null);
  const [state, setState] = useState("live");
  const [round, setRound] = useState(0);
  const [, draw] = useState(0);
  const story = useRef(new Story());

  useEffect(() => {
    const control = new AbortController();
    const { signal } = control;
    const timers = {};
    const later = (name, seconds, action) => {
      timers[name] ??= setTimeout(() => {
        timers[name] = null;
        action();
      }, 1000 * seconds);
    };
    const never = (name) => {
      clearTimeout(timers[name]);
      timers[name] = null;
    };
    let stop = () => {};
    let tries = 0;
    const drawSoon = () => later("draw", DRAWN_EVERY, () => draw((n) => n + 1));

    const heard = (how) => {
      if (how === "closed") again();
      else if (how === "lost") later("lost", UNNOTICED, () => setState("lost"));
      else {
        tries = 0;
        never("lost");
        setState("live");
      }
    };
    const again = () => {
      stop();
      heard("lost");
      later("again", Math.min(2 ** tries, LONGEST_PAUSE), start);
      tries += 1;
    };
    const failed = (reason) => {
      if (signal.aborted) return;
      if (reason.status === 0 || reason.status >= 500) again();
      else setError(reason);
    };

    let looks = 0;
    let newest = 0;
    const look = async () => {
      const number = ++looks;
      const now = await get(`/jobs/${id}`, {}, signal);
      if (number < newest) return now; // one asked later has answered: this one is older than what is shown
      newest = number;
      setJob(now);
      if (!now.terminal) return now;
      stop();
      // What has not come yet of an ended job comes in one go; a stream of it would only be opened again.
      for (const event of await all(`/jobs/${id}/events`, { after: story.current.last }, MOST_EVENTS)) story.current.add(event);
      heard("live");
      drawSoon();
      return now;
    };
    const hear = (event) => {
      if (!story.current.add(event)) return;
      drawSoon();
      if (event.type === "progress") setJob((before) => moved(before, event));
      else if (event.type === "status") look().catch(failed);
    };
    const start = async () => {
      stop();
      try {
        const now = await look();
        if (now.terminal || document.hidden || signal.aborted) return;
        stop(); // of two that started, the later one goes on
        stop = follow(id, hear, heard, story.current.last);
      } catch (reason) {
        failed(reason);
      }
    };
    // A browser opens six connections to one host: streams of tabs that nobody looks at would use them up.
    const seen = () => (document.hidden ? stop() : start());
    document.addEventListener("visibilitychange", seen);
    start();
    return () => {
      document.removeEventListener("visibilitychange", seen);
      control.abort();
      Object.keys(timers).forEach(never);
      stop();
    };
  }, [id, round]);

  useSignedIn(error, () => {
    setError(null);
    setRound((n) => n + 1);
  });
  const restart = (now) => {
    setJob(now);
    setRound((n) => n + 1);
  };
  return { job, story: story.current, error, state, restart };
}

/** The job with what a progress event says of it. What its end brings with it only the job itself tells. */
function moved(job, { message, data }) {
  const { stage, fraction, eta_seconds, status, attempt } = data;
  if (!job || job.terminal || ENDED.includes(status)) return job;
  return { ...job, stage, status, attempt, progress: { fraction, eta_seconds, message } };
}
