package apiserver

import (
	"context"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/plugin/namespace/lifecycle"
	mutatingpolicy "k8s.io/apiserver/pkg/admission/plugin/policy/mutating"
	validatingpolicy "k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/admission/plugin/resourcequota"
	mutatingwebhook "k8s.io/apiserver/pkg/admission/plugin/webhook/mutating"
	validatingwebhook "k8s.io/apiserver/pkg/admission/plugin/webhook/validating"
	"k8s.io/component-base/metrics"
	"k8s.io/kubernetes/plugin/pkg/admission/certificates/approval"
	"k8s.io/kubernetes/plugin/pkg/admission/certificates/ctbattest"
	"k8s.io/kubernetes/plugin/pkg/admission/certificates/signing"
	"k8s.io/kubernetes/plugin/pkg/admission/certificates/subjectrestriction"
	"k8s.io/kubernetes/plugin/pkg/admission/defaulttolerationseconds"
	"k8s.io/kubernetes/plugin/pkg/admission/gc"
	"k8s.io/kubernetes/plugin/pkg/admission/job"
	"k8s.io/kubernetes/plugin/pkg/admission/nodedeclaredfeatures"
	"k8s.io/kubernetes/plugin/pkg/admission/noderestriction"
	"k8s.io/kubernetes/plugin/pkg/admission/podgroup"
	"k8s.io/kubernetes/plugin/pkg/admission/podresize"
	"k8s.io/kubernetes/plugin/pkg/admission/priority"
	"k8s.io/kubernetes/plugin/pkg/admission/runtimeclass"
	"k8s.io/kubernetes/plugin/pkg/admission/security/podsecurity"
	"k8s.io/kubernetes/plugin/pkg/admission/serviceaccount"
	"k8s.io/kubernetes/plugin/pkg/admission/storage/persistentvolume/resize"
)

// plugins runs admission plugins as upstream's chain does, and counts them in upstream's series, on children that are looked up once.
// Plugins that have nothing to do with a request (see idleness) are counted and not run.
// Source: chain.go, reinvocation.go and metrics/metrics.go in k8s.io/apiserver/pkg/admission.
type plugins struct {
	vectors *admissionVectors // nil: nothing is counted
	handled map[admission.Operation]bool
	// order is each step's plugins by operation.
	order [2]map[admission.Operation][]*plugin
	took  [2][]*durations // of a whole step: as histogram and as summary
	all   []*durations
}

// plugin is one plugin.
type plugin struct {
	mutating   admission.MutationInterface   // nil where it only validates
	validating admission.ValidationInterface // nil where it only mutates
	// idle says that neither step of the plugin would do anything to a request.
	idle func(admission.Attributes) bool
	// reads says that the plugin changes no object that is deleted.
	reads bool
	// checks says that the plugin's validation only reads the objects.
	checks bool
	// spares says that the plugin leaves the spec alone where a status is updated.
	spares bool
	// all says that the plugin is for objects of all kinds: others look at none that is a custom resource.
	all  bool
	took [2]*durations
}

// readers are plugins that see deletions and change no object at one.
var readers = []string{lifecycle.PluginName, noderestriction.PluginName, priority.PluginName}

// checkers are plugins that validate creates or updates and only read what they are given.
var checkers = []string{serviceaccount.PluginName, podsecurity.PluginName, priority.PluginName, resize.PluginName, approval.PluginName,
	signing.PluginName, ctbattest.PluginName, nodedeclaredfeatures.PluginName, job.PluginName, podresize.PluginName, runtimeclass.PluginName,
	subjectrestriction.PluginName, podgroup.PluginName}

// sparers are plugins that see updates of statuses and change no spec then.
var sparers = []string{lifecycle.PluginName, serviceaccount.PluginName, noderestriction.PluginName, priority.PluginName, defaulttolerationseconds.PluginName}

// general are plugins for objects of all kinds. NamespaceLifecycle, too, is for all, but looks at where an object is to be, not at it.
var general = []string{mutatingwebhook.PluginName, mutatingpolicy.PluginName, validatingwebhook.PluginName, validatingpolicy.PluginName,
	resourcequota.PluginName, gc.PluginName}

// Steps of admission.
const (
	admitStep = iota
	validateStep
)

var stepNames = [2]string{"admit", "validate"}

var (
	_ admission.MutationInterface   = (*plugins)(nil)
	_ admission.ValidationInterface = (*plugins)(nil)
)

func newPlugins(vectors *admissionVectors) *plugins {
	p := &plugins{vectors: vectors, handled: map[admission.Operation]bool{}}
	for step := range p.order {
		p.order[step] = map[admission.Operation][]*plugin{}
		if vectors != nil {
			p.took[step] = []*durations{p.durations(vectors.steps, stepNames[step]), p.durations(vectors.stepSummaries, stepNames[step])}
		}
	}
	return p
}

func (p *plugins) durations(v durationVector, labels ...string) *durations {
	d := &durations{vector: v, labels: labels}
	p.all = append(p.all, d)
	return d
}

// add appends a plugin.
func (p *plugins) add(name string, given admission.Interface, idle func(admission.Attributes) bool) {
	one := &plugin{idle: idle, reads: slices.Contains(readers, name), checks: slices.Contains(checkers, name), spares: slices.Contains(sparers, name),
		all: slices.Contains(general, name)}
	one.mutating, _ = given.(admission.MutationInterface)
	one.validating, _ = given.(admission.ValidationInterface)
	for step := range one.took {
		if p.vectors != nil {
			one.took[step] = p.durations(p.vectors.plugins, name, stepNames[step])
		}
	}
	for _, o := range operations {
		if !given.Handles(o) {
			continue
		}
		p.handled[o] = true
		if one.mutating != nil {
			p.order[admitStep][o] = append(p.order[admitStep][o], one)
		}
		if one.validating != nil {
			p.order[validateStep][o] = append(p.order[validateStep][o], one)
		}
	}
}

// Handles implements admission.Interface.
func (p *plugins) Handles(o admission.Operation) bool { return p.handled[o] }

// Admit implements admission.MutationInterface.
func (p *plugins) Admit(ctx context.Context, a admission.Attributes, o admission.ObjectInterfaces) error {
	return p.step(admitStep, a, func(now time.Time) (time.Time, error) {
		now, err := p.run(ctx, admitStep, a, o, now)
		if again := a.GetReinvocationContext(); err == nil && again.ShouldReinvoke() {
			again.SetIsReinvoke()
			now, err = p.run(ctx, admitStep, a, o, now)
		}
		return now, err
	})
}

// Validate implements admission.ValidationInterface.
func (p *plugins) Validate(ctx context.Context, a admission.Attributes, o admission.ObjectInterfaces) error {
	return p.step(validateStep, a, func(now time.Time) (time.Time, error) { return p.run(ctx, validateStep, a, o, now) })
}

// onlyRead says that no plugin that would run at a deletion changes what it is given.
func (p *plugins) onlyRead(a admission.Attributes) bool {
	for _, order := range p.order {
		for _, one := range order[a.GetOperation()] {
			if !one.reads && (one.idle == nil || !one.idle(a)) {
				return false
			}
		}
	}
	return true
}

// onlyChecks says that no plugin that would validate a create or an update changes what it is given.
func (p *plugins) onlyChecks(a admission.Attributes) bool {
	for _, one := range p.order[validateStep][a.GetOperation()] {
		if !one.checks && (one.idle == nil || !one.idle(a)) {
			return false
		}
	}
	return true
}

// spareSpecs says that no plugin that would run at an update of a status changes the spec.
func (p *plugins) spareSpecs(a admission.Attributes) bool {
	for _, one := range p.order[admitStep][admission.Update] {
		if !one.spares && (one.idle == nil || !one.idle(a)) {
			return false
		}
	}
	return true
}

// quiet says that no plugin that would run in a step looks at an object that is a custom resource.
func (p *plugins) quiet(step int, a admission.Attributes) bool {
	for _, one := range p.order[step][a.GetOperation()] {
		if one.all && (one.idle == nil || !one.idle(a)) {
			return false
		}
	}
	return true
}

// step measures one step.
func (p *plugins) step(step int, a admission.Attributes, run func(time.Time) (time.Time, error)) error {
	began := time.Now()
	ended, err := run(began)
	for _, d := range p.took[step] {
		d.observe(ended.Sub(began), a.GetOperation(), err != nil)
	}
	return err
}

// run asks the plugins in order until one refuses. It takes and gives the present time, since each plugin's end is the next one's beginning.
func (p *plugins) run(ctx context.Context, step int, a admission.Attributes, o admission.ObjectInterfaces, now time.Time) (time.Time, error) {
	op := a.GetOperation()
	for _, one := range p.order[step][op] {
		if one.idle != nil && one.idle(a) {
			one.took[step].observe(0, op, false)
			continue
		}
		var err error
		if step == admitStep {
			err = one.mutating.Admit(ctx, a, o)
		} else {
			err = one.validating.Validate(ctx, a, o)
		}
		end := time.Now()
		one.took[step].observe(end.Sub(now), op, err != nil)
		if now = end; err != nil {
			return now, err
		}
	}
	return now, nil
}

// forget drops the children that a reset of the vectors has cut off.
func (p *plugins) forget() {
	for _, d := range p.all {
		for i := range d.children {
			d.children[i][0].Store(nil)
			d.children[i][1].Store(nil)
		}
	}
}

// operations are all that there are.
var operations = [...]admission.Operation{admission.Create, admission.Update, admission.Delete, admission.Connect}

// durationVector is a histogram or a summary.
type durationVector interface {
	WithLabelValues(labels ...string) metrics.ObserverMetric
}

// durations are a vector's children of one plugin, or of all, in one step. Nil counts nothing.
type durations struct {
	vector   durationVector
	labels   []string // the first ones
	children [len(operations)][2]atomic.Pointer[metrics.ObserverMetric]
}

func (d *durations) observe(took time.Duration, operation admission.Operation, rejected bool) {
	at := slices.Index(operations[:], operation)
	if d == nil || at < 0 {
		return
	}
	child := &d.children[at][0]
	if rejected {
		child = &d.children[at][1]
	}
	known := child.Load()
	if known == nil {
		found := d.vector.WithLabelValues(append(slices.Clone(d.labels), string(operation), strconv.FormatBool(rejected))...)
		known = &found
		child.Store(known)
	}
	(*known).Observe(took.Seconds())
}

// admissionVectors are upstream's own series of admission, which its package keeps to itself; see requestVectors.
type admissionVectors struct {
	plugins, steps *metrics.HistogramVec
	//lint:ignore SA1019 upstream's own series is a summary
	stepSummaries *metrics.SummaryVec
}

// summaryAge is how long upstream's summary of a step looks back.
const summaryAge = 5 * time.Hour

// findAdmissionVectors gives nil where this version of upstream's package has other series than we know; a test tells.
// Source: k8s.io/apiserver/pkg/admission/metrics/metrics.go.
func findAdmissionVectors() *admissionVectors {
	buckets := []float64{0.005, 0.025, 0.1, 0.5, 1.0, 2.5}
	labels := []string{"type", "operation", "rejected"}
	const stepHelp = " in seconds, broken out for each operation and API resource and step type (validate or admit)."
	v := &admissionVectors{
		plugins: registered(metrics.NewHistogramVec(&metrics.HistogramOpts{Namespace: "apiserver", Subsystem: "admission", Buckets: buckets,
			Name: "controller_admission_duration_seconds", StabilityLevel: metrics.STABLE,
			Help: "Admission controller latency histogram in seconds, identified by name and broken out for each operation and API resource and type (validate or admit)."},
			append([]string{"name"}, labels...))),
		steps: registered(metrics.NewHistogramVec(&metrics.HistogramOpts{Namespace: "apiserver", Subsystem: "admission", Buckets: buckets,
			Name: "step_admission_duration_seconds", StabilityLevel: metrics.STABLE, Help: "Admission sub-step latency histogram" + stepHelp}, labels)),
		//lint:ignore SA1019 upstream's own series is a summary
		stepSummaries: registered(metrics.NewSummaryVec(&metrics.SummaryOpts{Namespace: "apiserver", Subsystem: "admission", MaxAge: summaryAge,
			Name: "step_admission_duration_seconds_summary", StabilityLevel: metrics.ALPHA, Help: "Admission sub-step latency summary" + stepHelp}, labels)),
	}
	if v.plugins == nil || v.steps == nil || v.stepSummaries == nil {
		return nil
	}
	return v
}
