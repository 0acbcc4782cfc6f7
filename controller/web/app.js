// A read-only view of the fleet: asks for nodes and containers every five seconds and shows what came.
const INTERVAL = 5000;
const state = document.getElementById("state");
let token = "";
let timer = 0;

async function get(path) {
  const response = await fetch(path, { headers: { Authorization: `Bearer ${token}` } });
  const answer = await response.json();
  if (answer.type === "error") throw new Error(answer.error);
  return answer.metadata;
}

function fill(id, rows) {
  const lines = rows.map((cells) => {
    const line = document.createElement("tr");
    for (const cell of cells) {
      // textContent only: what a container says of itself is never markup.
      line.appendChild(document.createElement("td")).textContent = cell ?? "–";
    }
    return line;
  });
  document.getElementById(id).replaceChildren(...lines);
}

function size(bytes) {
  return bytes === null ? null : `${(bytes / 1e9).toFixed(1)} GB`;
}

function nodeRow(node) {
  const cpu = node.load.cpu_load;
  return [node.name, node.online ? node.status : `${node.status}: ${node.message}`, node.containers,
    cpu === null ? null : `${Math.round(cpu * 100)}%`, size(node.load.memory_free), size(node.load.disk_free)];
}

function containerRow(container) {
  const status = container.status;
  const machine = status.machine[0];
  const reason = status.reason ? `: ${status.reason}` : "";
  return [container.id, container.hostname, container.node, status.status + reason, machine.ip_address,
    machine.cpu_load, machine.free_memory, machine.disk_usage];
}

async function refresh() {
  try {
    const [nodes, containers] = await Promise.all([get("/1.0/nodes?recursion=1"), get("/1.0/vz?recursion=1")]);
    fill("nodes", nodes.map(nodeRow));
    fill("containers", containers.map(containerRow));
    document.querySelector("main").hidden = false;
    document.getElementById("login").hidden = true;
    state.textContent = `as of ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    state.textContent = `not connected: ${error.message}`;
  }
  timer = setTimeout(refresh, INTERVAL);
}

document.getElementById("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = document.getElementById("token").value.trim();
  clearTimeout(timer);
  refresh();
});
