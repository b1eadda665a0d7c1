// Requests to the endpoint that served this page, and to nothing else.

/** What the endpoint answers when it refuses (RFC 9457), or that it does not answer. */
export class Problem extends Error {
  constructor(title, detail, { status = 0, requestId = "", retryAfter = 0 } = {}) {
    super(title);
    Object.assign(this, { title, detail, status, requestId, retryAfter });
  }
}

/** The draft of one study. `files` are its images; their names, which may name a patient, are not sent. */
export async function readStudy(files, key, signal) {
  const form = new FormData();
  files.forEach((file) => form.append("file", file, "film"));
  const answer = await ask("v1/reports?film=true", key, { method: "POST", body: form, signal });
  return answer.json();
}

/** Version of the model that answers; empty where there is none or the key does not open it. */
export async function modelVersion(key) {
  try {
    const { models } = await (await ask("v1/models", key, {})).json();
    return models.map((model) => model.model_version).join(", ");
  } catch {
    return "";
  }
}

async function ask(path, key, options) {
  const headers = { accept: "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  let answer;
  try {
    // No cookies, no cache, and no following to another place.
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error", referrerPolicy: "no-referrer" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The endpoint does not answer", "Check the network, or ask its operator, then try again.");
  }
  if (!answer.ok) throw await problemOf(answer);
  return answer;
}

async function problemOf(answer) {
  const tree = await answer.json().catch(() => ({}));
  const facts = { status: answer.status, requestId: tree.request_id ?? "", retryAfter: Number(answer.headers.get("retry-after")) || 0 };
  return new Problem(tree.title ?? `The endpoint answers ${answer.status}`, tree.detail ?? "It gives no reason.", facts);
}
